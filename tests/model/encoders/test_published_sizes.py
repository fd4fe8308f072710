"""The encoder configs have exactly the published parameters and shapes, counted on the meta device."""

import pytest
import torch

from eagle_train.model.encoders.base import aligned, antialiased
from eagle_train.train.config import build, load_config, options

PUBLISHED = {  # parameters, channels, grid
    "clip_l14_336": (303_505_408, 1024, 24),
    "clip_l14_448": (303_505_408 + (32**2 - 24**2) * 1024, 1024, 32),  # more positions
    "convnext_xxl_1024": (843_391_872, 3072, 32),
    "sam_l_1024": (307_687_936, 1024, 32),
    "sam_l_1024_neck": (307_687_936, 1024, 32),
    "eva02_l_det_1024": (303_388_608, 1024, 64),
    "pix2struct_l_1024": (512_812_032, 1536, 45),
    "siglip2_so400m_384": (413_018_352, 1152, 24),
    "dinov2_l_518": (304_367_616, 1024, 37),
    "dinov3_l_512": (303_079_424, 1024, 32),
    "cradio_v4_so400m_512": (431_238_384, 1152, 32),
}


def built(option):
    node = load_config(["+experiment=toy", f"+encoder@mixture.encoders.extra={option}"])["mixture"]["encoders"]["extra"]
    with torch.device("meta"):
        return build(node)


def test_every_encoder_config_is_checked():
    assert PUBLISHED.keys() == {name for name in options("encoder") if not name.startswith("toy")}


@pytest.mark.parametrize("option", PUBLISHED)
def test_parameters_and_shape_are_the_published_ones(option):
    encoder = built(option)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert (count, encoder.channels, encoder.grid) == PUBLISHED[option]
    tile = torch.zeros(1, 3, 1024, 1024, dtype=torch.uint8, device="meta")
    assert encoder(tile).shape == (1, encoder.channels, encoder.grid, encoder.grid)
    assert encoder.pretrained


def test_released_weights_see_aligned_pixels_and_their_successors_antialiased_ones():
    for name in ("clip_l14_336", "convnext_xxl_1024", "sam_l_1024", "eva02_l_det_1024"):
        assert built(name).resize is aligned
    for name in ("clip_l14_448", "sam_l_1024_neck", "pix2struct_l_1024", "dinov2_l_518"):
        assert built(name).resize is antialiased
    assert built("sam_l_1024").fresh and not built("sam_l_1024_neck").fresh
