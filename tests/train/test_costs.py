"""Costs of rows: from counted FLOPs, and from what a stage trains."""

from dataclasses import replace

import pytest

from eagle_train.model.describe import describe
from eagle_train.model.pass_flops import step_flops
from eagle_train.train.assemble import build_schedule, trained_meta_model
from eagle_train.train.costs import ForwardFlops, cost_model, forward_flops, is_trained
from eagle_train.train.optim import freeze
from eagle_train.train.schedule import Stage
from tests.configs import composed

FLOPS = ForwardFlops(
    per_token=2e6,
    per_token_squared=50.0,
    per_target=3e5,
    encoders={"vit": 7_000_000, "convnext": 5_000_000},
    fusion=1_000_000,
    encoder_pairs={"vit": 1000},
)


def stage(**rates):
    return Stage(recipe="x", learning_rates=rates, max_length=64, rows_per_step=1, num_steps=1)


def test_flops_of_the_toy_are_those_of_its_parameters():
    config = composed("+experiment=toy")
    model = trained_meta_model(config)
    flops = forward_flops(model, describe(model.mixture, config["data"]["tile_size"]))
    matrices = sum(p.numel() for name, p in model.llm.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
    assert flops.per_token + flops.per_target == pytest.approx(2 * matrices, rel=0.01)
    last = sum(p.numel() for p in model.llm.model.layers[-1].mlp.parameters())
    assert flops.per_target == 2 * (model.llm.get_output_embeddings().weight.numel() + last) > 0
    layers, width = model.llm.config.num_hidden_layers, model.llm.config.hidden_size
    assert flops.per_token_squared == pytest.approx(2 * layers * width, rel=0.01)  # half of 4, as it is causal
    assert set(flops.encoders) == {"vit", "convnext"} and min(flops.encoders.values()) > 0


def test_costs_are_the_flops_of_the_passes():
    config = composed("+experiment=toy")
    model = trained_meta_model(config)
    flops = forward_flops(model, describe(model.mixture, config["data"]["tile_size"]))
    for stage in build_schedule(config).values():
        freeze(model, stage.learning_rates)
        cost, useful = cost_model(flops, stage), step_flops(model, config["data"]["tile_size"], recomputed=False).useful
        assert (cost.per_token, cost.per_token_squared, cost.per_target) == pytest.approx(
            (useful.per_token, useful.per_square, useful.per_target), rel=1e-3
        )
        assert cost.per_tile == pytest.approx(useful.per_tile, rel=0.05)  # the first product needs no gradient of tiles


def test_what_is_frozen_has_no_backward_pass_and_what_is_passed_through_half_of_it():
    full = cost_model(FLOPS, stage(mixture=1.0, projector=1.0, llm=1.0))
    assert (full.per_token, full.per_token_squared, full.per_tile) == (6e6, 150.0, 3.9e7)
    assert full.per_target == 9e5
    first = cost_model(FLOPS, stage(mixture=None, projector=1.0, llm=None))
    assert (first.per_token, first.per_token_squared, first.per_tile) == (4e6, 150.0, 1.5e7)
    assert first.per_target == 6e5
    part = cost_model(FLOPS, stage(**{"mixture": 1.0, "mixture.encoders.vit": None, "projector": 1.0, "llm": 1.0}))
    assert (full.per_tile_pair, part.per_tile_pair) == (3000, 1000)
    one = cost_model(FLOPS, replace(stage(mixture=None, aligner=1.0, llm=None), align="convnext"))
    assert (one.per_tile, one.per_tile_pair) == (8e6, 0), "the other encoder does not run"
    assert part.per_tile == 2.5e7


def test_weights_below_adapters_have_no_gradients():
    config = composed("+experiment=toy", "lora=qwen", "lora.llm.rank=1")
    model = trained_meta_model(config)
    flops = forward_flops(model, describe(model.mixture, config["data"]["tile_size"]))
    assert flops.adapted == {"llm"}
    cost = cost_model(flops, stage(mixture=None, projector=1.0, llm=1.0))
    assert cost.per_token == pytest.approx(2 * flops.per_token, rel=1e-3)
    assert cost.per_token_squared == pytest.approx(3 * flops.per_token_squared, rel=1e-3)
    adapted = replace(FLOPS, adapted=frozenset({"mixture.encoders.vit"}))
    cost = cost_model(adapted, stage(mixture=1.0, projector=1.0, llm=1.0))
    assert (cost.per_tile, cost.per_tile_pair) == (3.2e7, 3000), "attention scores have no weights"


@pytest.mark.parametrize(
    ("rates", "trained"),
    [
        ({"mixture": None, "mixture.encoders.vit": 1.0}, True),
        ({"mixture": 1.0, "mixture.encoders.vit": None}, False),
        ({"mixture": None, "mixture.encoders.vit.blocks": 1.0}, True),
        ({"mixture": None, "mixture.encoders.vitality": 1.0}, False),
    ],
)
def test_the_longest_prefix_says_what_is_trained(rates, trained):
    assert is_trained(stage(**rates), "mixture.encoders.vit") is trained


@pytest.mark.slow
def test_every_experiment_has_costs_in_every_stage():
    config = composed("+experiment=toy-x4")
    model = trained_meta_model(config)
    flops = forward_flops(model, describe(model.mixture, config["data"]["tile_size"]))
    costs = [cost_model(flops, stage) for stage in build_schedule(config).values()]
    assert costs[0].per_token < costs[-1].per_token and costs[0].per_tile < costs[-1].per_tile


def test_a_batch_in_tokens_is_a_number_of_full_rows():
    values = {"recipe": "x", "learning_rates": {}, "max_length": 512, "num_steps": 1}
    assert Stage(**values, tokens_per_step=4096).rows_per_step == 8
    with pytest.raises(ValueError, match="tokens_per_step 4000 is no multiple of max_length 512; the nearest is 4096"):
        Stage(**values, tokens_per_step=4000)
    with pytest.raises(ValueError, match="give rows_per_step"):
        Stage(**values, tokens_per_step=4096, rows_per_step=8)
