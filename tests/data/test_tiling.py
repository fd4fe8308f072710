"""One-tile tilings are the published pre-processing, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from eagle_train.data import tiling
from eagle_train.data.tiling import LARGEST_ASPECT, LARGEST_SIDE, CentreCrop, PadToSquare

clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
S = 96
SIZES = [(64, 48), (50, 33), (33, 45), (120, 81), (96, 96), (200, 31), (31, 200), (1, 1), (2, 1), (27, 1), (1, 27)]
SIZES += [(540, 20), (20, 541), (1300, 50), (50, 1303)]


def photo(width, height):
    noise = np.random.default_rng(width * height).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def cut(tiling, image, size):
    """Returns the tile of an image as a tensor (1, 3, size, size)."""
    out = np.full((1, 3, size, size), 255, np.uint8)
    tiling.cut(image, tiling.plan(*image.size), out)
    return torch.from_numpy(out)


def processed(image):
    """Returns what CLIP's image processor makes of an image, before it is normalized."""
    processor = clip.CLIPImageProcessorPil(
        size={"shortest_edge": S}, crop_size={"height": S, "width": S}, do_rescale=False, do_normalize=False
    )
    return torch.as_tensor(np.array(processor(image)["pixel_values"][0]))


@pytest.mark.parametrize("size", SIZES)
def test_centre_crop_is_clip_image_processing(size):
    image = photo(*size)
    tile = cut(CentreCrop(), image, S)
    assert tile.shape == (1, 3, S, S) and torch.equal(tile[0], processed(image).to(torch.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_padding_to_a_square_comes_before_clip_image_processing(size):
    image = photo(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    tile = cut(PadToSquare(), image, S)
    assert torch.equal(tile[0], processed(square).to(torch.uint8))


@pytest.mark.parametrize("size", [(27, 1), (1, 27), (810, 30), (30, 810)])
def test_a_long_strip_lies_across_the_middle_of_its_square(size):
    tile = cut(PadToSquare((0, 0, 0)), Image.new("RGB", size, (200, 200, 200)), 81)[0, 0]
    across = tile.float().mean(1 if size[0] > size[1] else 0)  # of the 81 lines, the middle three are the strip
    assert (across[39:42] > 150).all() and (across[:36] == 0).all() and (across[45:] == 0).all()


@pytest.mark.parametrize("size", [(27, 1), (1, 27), (811, 30), (30, 811)])
def test_the_centre_of_a_long_strip_is_cropped(size):
    strip = np.zeros((size[1], size[0], 3), np.uint8)
    middle = [slice((side - min(size)) // 2, -(-(side + min(size)) // 2)) for side in size]
    strip[middle[1], middle[0]] = 200
    tile = cut(CentreCrop(), Image.fromarray(strip), 64)[0, 0]
    assert (tile[16:-16, 16:-16] > 150).all()
    strip[middle[1], middle[0]] = 0
    assert not cut(CentreCrop(), Image.fromarray(strip), 64).any()


@pytest.mark.parametrize("cutter", [PadToSquare(), CentreCrop()], ids=lambda cutter: type(cutter).__name__)
@pytest.mark.parametrize("size", [(1_000_000, 3), (3, 1_000_000)])
def test_a_strip_of_any_length_takes_little_memory(cutter, size):
    assert LARGEST_SIDE**2 * 4 < 300 * 2**20 and LARGEST_ASPECT * 1024**2 * 4 < 300 * 2**20
    image = Image.new("RGB", size, (200, 100, 50))
    tile = cut(cutter, image, 16)
    assert tile.shape == (1, 3, 16, 16)
    assert tile[0, :, 8, 8].tolist() == ([200, 100, 50] if isinstance(cutter, CentreCrop) else [122, 116, 104])


def test_an_image_over_the_limit_is_padded_like_one_under_it(monkeypatch):
    image = photo(620, 100)
    plain = cut(PadToSquare(), image, 32)
    monkeypatch.setattr(tiling, "LARGEST_SIDE", 310)
    reduced = cut(PadToSquare(), image, 32)
    assert 0 < (plain.int() - reduced.int()).abs().max() <= 12


def test_a_strip_over_the_limit_is_cropped_like_one_under_it(monkeypatch):
    image = photo(620, 20)
    plain = cut(CentreCrop(), image, 32)
    monkeypatch.setattr(tiling, "LARGEST_ASPECT", 4)
    assert (plain.int() - cut(CentreCrop(), image, 32).int()).abs().max() <= 12
