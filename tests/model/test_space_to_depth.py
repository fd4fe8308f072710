"""Squares of tokens become channels: the published order, in Eagle 2's mixture of one encoder and in MoVE."""

import pytest
import torch
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from eagle_train.model.geometry import GeometryError
from eagle_train.model.mixtures.channel_concat import ChannelConcat, space_to_depth
from eagle_train.model.projector import MlpProjector
from eagle_train.train.assemble import meta_model
from eagle_train.train.config import ConfigError, build, load_config
from tests.model.encoders import tiny
from tests.model.encoders.tiny import pixels, randomized, relative_error


def explicit(tokens, grid):
    """Returns the published order: (2r,2q), (2r,2q+1), (2r+1,2q), (2r+1,2q+1), token after token."""
    at = tokens.unflatten(1, (grid, grid))
    squares = [
        torch.cat(
            [at[:, 2 * r, 2 * q], at[:, 2 * r, 2 * q + 1], at[:, 2 * r + 1, 2 * q], at[:, 2 * r + 1, 2 * q + 1]], -1
        )
        for r in range(grid // 2)
        for q in range(grid // 2)
    ]
    return torch.stack(squares, dim=1)


@pytest.mark.parametrize("grid", [2, 4, 32])
def test_the_order_is_the_published_one(grid):
    tokens = torch.randn(3, grid * grid, 5)
    assert torch.equal(space_to_depth(tokens, 2), explicit(tokens, grid))


@pytest.mark.parametrize("fold", [1, 2, 3, 6])
def test_every_value_is_kept_in_its_square(fold):
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]
    folded = space_to_depth(places, fold)
    assert folded.shape == (1, (6 // fold) ** 2, 2 * fold**2)
    squares = folded.unflatten(-1, (fold**2, 2)) // fold
    assert torch.equal(squares, squares[:, :, :1].expand_as(squares))
    assert torch.equal(squares[0, :, 0], torch.cartesian_prod(*[torch.arange(6 // fold)] * 2).view(-1, 2))


@torch.no_grad()
def test_eagle2_is_the_bare_siglip_and_the_shuffle():
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    bare = randomized(SiglipVisionModel(SiglipVisionConfig(**shape, num_hidden_layers=2, vision_use_head=False)))
    encoder = tiny.siglip()
    encoder.load_state_dict(encoder.adapt(bare.state_dict()))
    tiles = pixels(side=32)
    mixture = ChannelConcat(encoders={"siglip": encoder}, fold={"siglip": 2})
    wanted = explicit(bare((tiles / 255 - 0.5) / 0.5).last_hidden_state, 4)
    assert mixture(tiles).shape == (2, mixture.tokens_per_tile, mixture.channels) == (2, 4, 64)
    assert torch.equal(mixture(tiles), wanted)


def move(**options):
    encoders = {"siglip": randomized(tiny.siglip()), "convnext": randomized(tiny.convnext())}
    return ChannelConcat(encoders=encoders, fold={"siglip": 2}, **options)


@torch.no_grad()
def test_move_is_siglip_folded_and_then_convnext_as_it_is():
    mixture = move()
    siglip, convnext = mixture.encoders["siglip"](pixels()), mixture.encoders["convnext"](pixels())
    features = mixture(pixels())
    assert features.shape == (2, 4, 4 * 16 + 24) and mixture.grids == {"siglip": 4, "convnext": 2}
    assert torch.equal(features[..., :64], explicit(siglip.flatten(2).transpose(1, 2), 4))
    assert torch.equal(features[..., 64:], convnext.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_convnext_of_move_sees_the_normalized_tile_resized_and_normalized_again():
    node = load_config(["+experiment=toy", "mixture=eagle2_move"])["mixture"]["encoders"]["convnext"]
    with torch.device("meta"):
        encoder = build(node)
    tiles = pixels(side=448)
    halves = F.interpolate((tiles / 255 - 0.5) / 0.5, size=(512, 512), mode="bilinear", align_corners=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    published = halves * (0.5 / std) + (0.5 - mean) / std
    found = encoder.normalize(tiles, encoder.input_size)
    assert relative_error(found, published) < 1e-6


def test_frozen_towers_keep_no_graph_and_trained_ones_all_learn():
    mixture = move()
    mixture.encoders["siglip"].requires_grad_(False)
    features = mixture(pixels())
    features.square().sum().backward()
    assert all(parameter.grad is None for parameter in mixture.encoders["siglip"].parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in mixture.encoders["convnext"].parameters())
    mixture.requires_grad_(False)
    assert not mixture(pixels()).requires_grad


def test_an_odd_grid_is_refused_with_the_nearest_sizes():
    encoder = tiny.siglip(image_size=40)
    with pytest.raises(GeometryError, match=r"siglip: 40 px .* groups of 2 patches of 8 px; .* 32 or 48") as error:
        ChannelConcat(encoders={"siglip": encoder}, fold={"siglip": 2})
    assert error.value.argument == "encoders.siglip.image_size"
    assert ChannelConcat(encoders={"siglip": encoder}, fold={"siglip": 2}, grid=3).grids == {"siglip": 6}


def test_the_proposal_for_an_odd_grid_is_possible():
    overrides = ["+experiment=toy", "mixture=toy_eagle2", "mixture.encoders.siglip.image_size=72"]
    with pytest.raises(ConfigError, match=r"possible: mixture\.encoders\.siglip\.image_size=64") as error:
        meta_model(load_config(overrides))
    proposal = str(error.value).partition("possible: mixture")[2]
    assert meta_model(load_config([*overrides, f"mixture{proposal.split()[0]}"])).mixture.tokens_per_tile == 16


@pytest.mark.parametrize("fold", [{"siglip": 0}, {"sigclip": 2}])
def test_a_fold_of_nothing_is_refused(fold):
    with pytest.raises(ValueError, match=f"\\['siglip'\\] .* not {fold}"):
        ChannelConcat(encoders={"siglip": tiny.siglip()}, fold=fold)


def test_the_connector_is_layer_norm_and_linear_layers_with_exact_gelu():
    projector = MlpProjector(8, 6, layer_norm=True)
    norm, first, _, last = projector.layers
    x = torch.randn(3, 8)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = first(normed * norm.weight + norm.bias)
    exact = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(projector(x), last(exact))
    assert [name for name, _ in MlpProjector(8, 6, depth=1).named_parameters()] == ["layers.0.weight", "layers.0.bias"]
