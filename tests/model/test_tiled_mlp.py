"""MLPs in tiles give what they give whole, and hold less."""

import copy

import pytest
import torch

from eagle_train.model.llm import build_llm
from eagle_train.model.memory import LiveBytes, activation_bytes, meta_row
from eagle_train.model.tiled_mlp import TiledMlp, tile_mlps
from tests.toys import TILE, TOKENS_PER_TILE, gradients, tiny_model, tiny_row, tiny_sample, weighted_loss

ROWS = [
    tiny_row([tiny_sample(1, tiles=1), tiny_sample(2, tiles=0, text=20), tiny_sample(3, tiles=2)]),
    tiny_row([tiny_sample(4, tiles=0)]),
]


def trained(model, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = weighted_loss(model, ROWS)
    loss.backward()
    return float(loss.detach()), gradients(model)


def models(tile, llm="llama"):
    """Returns the same model twice, the second with its MLPs in tiles."""
    whole = tiny_model(model_type=llm).train()
    tiled = copy.deepcopy(whole)
    tile_mlps(tiled.llm, tile)
    return whole, tiled


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("llm", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tile", [1, 7, 20, 1000])
def test_tiles_change_neither_loss_nor_gradients(tile, llm, recomputed):
    whole, tiled = models(tile, llm)
    assert sum(isinstance(module, TiledMlp) for module in tiled.modules()) == 2
    if recomputed:
        tiled.set_activation_checkpointing(offload=True)
    (loss, expected), (tiled_loss, found) = trained(whole), trained(tiled)
    assert tiled_loss == pytest.approx(loss, abs=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_a_gradient_arrives_once_per_row_whatever_the_number_of_tiles():
    _, tiled = models(3)
    arrived = []
    weight = tiled.llm.model.layers[0].mlp.up_proj.weight
    weight.register_post_accumulate_grad_hook(lambda _: arrived.append(1))
    tiled(ROWS[0]).sum().backward()
    assert len(ROWS[0].input_ids) > 9 and arrived == [1]


def test_autocast_holds_in_both_passes():
    whole, tiled = models(7)
    (loss, expected), (tiled_loss, found) = trained(whole, autocast=True), trained(tiled, autocast=True)
    assert tiled_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=0.05, atol=0.02 * float(gradient.abs().max())), name
    # In float32 it would be nearer to the gradient of float32 than to that of bfloat16.
    exact = trained(models(7)[1])[1]["llm.model.layers.0.mlp.up_proj.weight"]
    name = "llm.model.layers.0.mlp.up_proj.weight"
    assert (found[name] - expected[name]).norm() < (found[name] - exact).norm()


def test_what_is_frozen_gets_no_gradient_and_what_is_not_gets_its_own():
    whole, tiled = models(5)
    for model in (whole, tiled):
        model.requires_grad_(False)
        model.llm.model.layers[0].mlp.up_proj.requires_grad_(True)  # all before it is frozen: its input has no graph
    (_, expected), (_, found) = trained(whole), trained(tiled)
    assert found.keys() == expected.keys() == {"llm.model.layers.0.mlp.up_proj.weight"}
    assert torch.allclose(found.popitem()[1], expected.popitem()[1], atol=1e-6)


def test_names_of_weights_stay_and_a_child_that_is_replaced_is_used():
    whole, tiled = models(5)
    assert list(whole.state_dict()) == list(tiled.state_dict())
    mlp = tiled.llm.model.layers[0].mlp
    mlp.down_proj = torch.nn.Linear(48, 32)
    torch.nn.init.zeros_(mlp.down_proj.weight)
    torch.nn.init.ones_(mlp.down_proj.bias)
    assert torch.equal(mlp(torch.randn(1, 9, 32)), torch.ones(1, 9, 32))


def test_tiles_can_be_changed_and_undone():
    whole, tiled = models(5)
    tile_mlps(tiled.llm, 6)
    assert tiled.llm.model.layers[1].mlp.tile == 6 and not isinstance(tiled.llm.model.layers[1].mlp.whole[0], TiledMlp)
    tile_mlps(tiled.llm, None)
    assert [type(module) for module in tiled.modules()] == [type(module) for module in whole.modules()]


def test_what_cannot_be_tiled_is_refused():
    with pytest.raises(ValueError, match="at least 1 token at a time, not 0"):
        tile_mlps(tiny_model().llm, 0)
    fields = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 9, "n_positions": 8}
    with pytest.raises(ValueError, match="dropout"):
        tile_mlps(build_llm(model_type="gpt2", resid_pdrop=0.1, **fields), 4)


@pytest.mark.slow
def test_memory_inside_an_mlp_does_not_grow_with_the_row_and_the_estimate_knows():
    mlp = tiny_model(intermediate_size=32 * 50).llm.model.layers[0].mlp
    held = {}
    for length in (256, 512):
        for module in (mlp, TiledMlp(mlp, 32)):
            hidden = torch.randn(1, length, 32, requires_grad=True)
            with LiveBytes("cpu", known=[hidden, *mlp.parameters()]) as live:
                module(hidden).sum().backward()
            mlp.zero_grad()
            held[length, type(module)] = live.peak
    whole, tiled = (held[512, kind] - held[256, kind] for kind in (type(mlp), TiledMlp))
    assert tiled < 6 * 256 * 32 * 4 < whole / 20  # few tensors as large as the input

    estimates = []
    for tile in (None, 16):
        with torch.device("meta"):
            model = tiny_model(intermediate_size=32 * 50).train()
        model.set_activation_checkpointing()
        tile_mlps(model.llm, tile)
        row = meta_row(256, num_tiles=1, num_targets=7, tokens_per_tile=TOKENS_PER_TILE, tile_size=TILE)
        estimates.append(activation_bytes(model, row))
    assert estimates[1] < estimates[0] / 4
