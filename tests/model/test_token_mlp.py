"""MLPs in tiles, or of the tokens that matter, give what they give whole, and do and hold less."""

import copy
from dataclasses import replace

import pytest
import torch

from eagle_train.model.attention.packed import packed_hidden
from eagle_train.model.llm import build_llm
from eagle_train.model.memory import LiveBytes, activation_bytes, meta_row
from eagle_train.model.token_mlp import TokenMlp, pass_over_unwanted, tile_mlps
from eagle_train.types import IGNORE_INDEX
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
    assert [module.tile for module in tiled.modules() if isinstance(module, TokenMlp)] == [tile, tile]
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
    _, tiled = models(5)
    tile_mlps(tiled.llm, 6)
    first, last = (layer.mlp for layer in tiled.llm.model.layers)
    assert first.tile == last.tile == 6 and not isinstance(first.whole[0], TokenMlp)
    tile_mlps(tiled.llm, None)
    assert tiled.llm.model.layers[0].mlp is first and first.tile is last.tile is None


def losses_of_all_tokens(model, row):
    """Returns the losses of a row, of which every token was finished."""
    embeddings = model.embed(row.input_ids, row.image_positions, row.pixels)
    return model.llm.get_output_embeddings()(
        packed_hidden(model.llm.model, embeddings, row, model.attention), row.labels
    )


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("llm", ["llama", "qwen2", "qwen3"])
def test_tokens_without_a_label_need_no_mlp_in_the_last_layer(llm, tile, recomputed):
    whole, ours = models(tile, llm)
    if recomputed:
        ours.set_activation_checkpointing(offload=True)
    treated = [[], []]
    for layer, lengths in zip(ours.llm.model.layers, treated, strict=True):
        layer.mlp.down_proj.register_forward_hook(
            lambda _, inputs, __, lengths=lengths: lengths.append(inputs[0][..., 0].numel())
        )
    expected = [losses_of_all_tokens(whole, row) for row in ROWS]
    found = [ours(row) for row in ROWS]  # all forward passes before the first backward one
    if tile is None:
        assert treated[0][: len(ROWS)] == [row.num_tokens for row in ROWS]
        assert treated[1][: len(ROWS)] == [row.num_targets for row in ROWS] and ROWS[0].num_targets < ROWS[0].num_tokens
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    for losses in (expected, found):
        sum((loss * row.loss_weights).sum() for loss, row in zip(losses, ROWS, strict=True)).backward()
    expected, found = gradients(whole), gradients(ours)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6 * max(1.0, float(gradient.abs().max()))), name


def test_a_row_without_labels_gives_every_weight_a_gradient_of_zero():
    model = tiny_model().train()
    model(replace(ROWS[0], labels=torch.full_like(ROWS[0].labels, IGNORE_INDEX), num_targets=0)).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all((parameter.grad == 0).all() for parameter in trained)


def test_whoever_wants_no_losses_has_all_tokens_finished_and_a_copy_has_wants_of_its_own():
    model = tiny_model().eval()
    fresh = copy.deepcopy(model)
    model(ROWS[0])
    assert fresh.llm.model.layers[-1].mlp.wanted is None
    ids = ROWS[0].input_ids[None, :9]
    assert torch.equal(model.llm(input_ids=ids).logits, fresh.llm(input_ids=ids).logits)
    fresh(ROWS[1])
    assert model.llm.model.layers[-1].mlp.wanted is None
    assert len(fresh.llm.model.layers[-1].mlp.wanted) == ROWS[1].num_targets


def test_an_llm_whose_last_layer_is_random_or_has_no_mlp_stays_as_it_is():
    llm = tiny_model().llm
    llm.model.layers[-1].mlp = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Dropout(0.1))
    pass_over_unwanted(llm)
    assert type(llm.model.layers[-1].mlp) is torch.nn.Sequential
    llm.model.layers[-1].feed_forward = llm.model.layers[-1]._modules.pop("mlp")
    pass_over_unwanted(llm)
    assert not isinstance(llm.model.layers[-1].feed_forward, TokenMlp)


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
        for module in (mlp, TokenMlp(mlp, 32)):
            hidden = torch.randn(1, length, 32, requires_grad=True)
            with LiveBytes("cpu", known=[hidden, *mlp.parameters()]) as live:
                module(hidden).sum().backward()
            mlp.zero_grad()
            held[length, type(module)] = live.peak
    whole, tiled = (held[512, kind] - held[256, kind] for kind in (type(mlp), TokenMlp))
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
