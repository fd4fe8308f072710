"""The encoder and mixture configs have exactly the published parameters and shapes, counted on the meta device."""

from functools import cache

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from eagle_train.model.encoders.base import aligned, antialiased
from eagle_train.train.config import build, load_choice, options
from tests.configs import composed

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
    "cradio_v4_so400m_448": (431_238_384, 1152, 28),
    "siglip_so400m_448": (413_327_088, 1152, 32),
    "siglip2_so400m_448": (413_327_088, 1152, 32),
    "siglip2_so400m_512": (413_018_352 + (32**2 - 24**2) * 1152, 1152, 32),  # more positions
    "intern_vit_300m_448": (304_012_288, 1024, 32),
    "convnext_xxl_512": (843_391_872, 3072, 16),
}


@cache
def built(option):
    with torch.device("meta"):
        return build(load_choice("encoder", option))


def test_every_encoder_config_is_checked():
    own_shape = {"qwen2_vit"}  # of native resolution, see test_qwen2_vl_sizes.py
    assert PUBLISHED.keys() == {name for name in options("encoder") if not name.startswith("toy")} - own_shape


@pytest.mark.slow
@pytest.mark.parametrize("option", PUBLISHED)
def test_parameters_and_shape_are_the_published_ones(option):
    encoder = built(option)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert (count, encoder.channels, encoder.grid) == PUBLISHED[option]
    tile = torch.zeros(1, 3, 1024, 1024, dtype=torch.uint8, device="meta")
    assert encoder(tile).shape == (1, encoder.channels, encoder.grid, encoder.grid)
    assert encoder.pretrained


@pytest.mark.slow
def test_released_weights_see_aligned_pixels_and_their_successors_antialiased_ones():
    for name in ("clip_l14_336", "convnext_xxl_1024", "convnext_xxl_512", "sam_l_1024", "eva02_l_det_1024"):
        assert built(name).resize is aligned
    for name in ("clip_l14_448", "sam_l_1024_neck", "pix2struct_l_1024", "dinov2_l_518"):
        assert built(name).resize is antialiased
    assert built("sam_l_1024").fresh and not built("sam_l_1024_neck").fresh


def test_siglip_without_its_pooling_head_has_the_published_parameters():
    encoder = built("siglip_so400m_448")
    with torch.device("meta"):
        config = SiglipVisionConfig(**encoder.vit.config.to_dict() | {"vision_use_head": True})
        published = sum(parameter.numel() for parameter in SiglipVisionModel(config).parameters())
    assert encoder.not_built == {"head": 15_238_352}
    assert published == 413_327_088 + 15_238_352


@pytest.mark.slow
def test_clip_statistics_for_convnext_and_halves_for_siglip():
    assert (built("siglip_so400m_448").mean, built("siglip_so400m_448").std) == ((0.5,) * 3, (0.5,) * 3)
    convnext = built("convnext_xxl_512")
    assert convnext.mean == (0.48145466, 0.4578275, 0.40821073)
    assert convnext.std == (0.26862954, 0.26130258, 0.27577711)


EAGLE2 = {  # tokens per tile, channels, parameters of the connector by hidden size of the LLM
    "eagle2_siglip": (256, 4608, {896: 4_942_592, 1536: 9_449_472, 3584: 29_376_512}),
    "eagle2_siglip2": (256, 4608, {}),
    "eagle2_move": (256, 7680, {3584: 40_392_704, 5120: 65_561_600}),
    "eagle2_cradio": (196, 4608, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("option", EAGLE2)
def test_eagle2_mixtures_and_connectors_have_the_published_sizes(option):
    config = composed("+experiment=toy", f"mixture={option}", "projector=eagle2")
    tokens, channels, connectors = EAGLE2[option]
    with torch.device("meta"):
        mixture = build(config["mixture"])
        tile = torch.zeros(2, 3, 448, 448, dtype=torch.uint8)
        assert mixture(tile).shape == (2, tokens, channels)
        for hidden_size, wanted in connectors.items():
            projector = build(config["projector"], in_channels=channels, hidden_size=hidden_size)
            assert sum(parameter.numel() for parameter in projector.parameters()) == wanted
