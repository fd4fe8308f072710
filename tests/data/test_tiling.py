"""One-tile tilings are the published pre-processing, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from eagle_train.data.tiling import CentreCrop, PadToSquare

clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
S = 96
SIZES = [(64, 48), (50, 33), (33, 45), (120, 81), (96, 96), (200, 31), (31, 200)]


def photo(width, height):
    noise = np.random.default_rng(width * height).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def processed(image):
    """Returns what CLIP's image processor makes of an image, before it is normalized."""
    processor = clip.CLIPImageProcessorPil(
        size={"shortest_edge": S}, crop_size={"height": S, "width": S}, do_rescale=False, do_normalize=False
    )
    return torch.as_tensor(np.array(processor(image)["pixel_values"][0]))


@pytest.mark.parametrize("size", SIZES)
def test_centre_crop_is_clip_image_processing(size):
    image = photo(*size)
    tile = CentreCrop().cut(image, CentreCrop().plan(*size), S)
    assert tile.shape == (1, 3, S, S) and torch.equal(tile[0], processed(image).to(torch.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_padding_to_a_square_comes_before_clip_image_processing(size):
    image = photo(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    tile = PadToSquare().cut(image, PadToSquare().plan(*size), S)
    assert torch.equal(tile[0], processed(square).to(torch.uint8))
