"""Schedule, freezing and groups."""

import itertools
import math

import pytest

from eagle_train.train.optim import adamw, freeze, freeze_table, parameter_groups, set_learning_rates
from eagle_train.train.schedule import Stage, lr_scale
from tests.toys import tiny_model


def stage(rates, **more):
    return Stage(recipe="x", learning_rates=rates, max_length=8, rows_per_step=1, num_steps=10, **more)


def test_warm_up_is_linear_then_cosine_to_the_minimum():
    scales = [lr_scale(step, 100, 10, 0.2) for step in range(100)]
    assert scales[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert scales[10] == pytest.approx(1.0)
    assert scales[55] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert all(a >= b for a, b in itertools.pairwise(scales[10:]))
    assert scales[-1] == pytest.approx(0.2, abs=1e-3) and scales[-1] >= 0.2


def test_warm_up_shorter_than_a_step_is_at_least_one_step():
    assert lr_scale(0, 10, 0, 0.0) == 1.0
    assert stage({}, warmup_ratio=0.01).num_warmup_steps(10) == 1
    assert stage({}, warmup_ratio=0.0).num_warmup_steps(10) == 0
    assert stage({}, warmup_ratio=0.5, warmup_steps=100).num_warmup_steps(22000) == 100


def test_the_longest_prefix_decides():
    model = tiny_model()
    freeze(model, {"mixture": None, "mixture.encoders.vit": 1e-4, "projector": 1e-3, "llm": None})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(("mixture.encoders.vit.", "projector.")) for name in trained)
    assert any(name.startswith("mixture.encoders.vit.") for name in trained)


def test_a_module_without_a_rate_and_a_rate_without_a_module_are_refused():
    with pytest.raises(ValueError, match="no learning rate for llm"):
        freeze(tiny_model(), {"mixture": None, "projector": 1.0})
    with pytest.raises(ValueError, match=r"\['lm'\].*match nothing; modules are \['llm'"):
        freeze(tiny_model(), {"mixture": None, "projector": 1.0, "llm": None, "lm": 1.0})


def test_groups_hold_every_trained_parameter_once_and_decay_matrices_only():
    model = tiny_model()
    plan = stage({"mixture": 1e-4, "projector": None, "llm": 1e-3}, weight_decay=0.1)
    freeze(model, plan.learning_rates)
    groups = parameter_groups(model, plan)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim >= 2 else 0.0)
        assert group["peak_lr"] == plan.learning_rates[group["name"]]
        assert len({p.ndim >= 2 for p in group["params"]}) == 1


def test_weight_decay_goes_by_the_longest_prefix():
    model = tiny_model()
    decay = {"mixture": 0.2, "mixture.encoders.vit": 0.0, "llm": 0.1}
    plan = stage({"mixture": 1e-4, "projector": None, "llm": 1e-3}, weight_decay=decay)
    freeze(model, plan.learning_rates)
    found = {id(p): group["weight_decay"] for group in parameter_groups(model, plan) for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim >= 2:
            key = "mixture.encoders.vit" if name.startswith("mixture.encoders.vit.") else name.split(".")[0]
            assert found[id(parameter)] == decay[key], name
        elif parameter.requires_grad:
            assert found[id(parameter)] == 0.0, name


def test_a_matrix_without_weight_decay_and_a_decay_without_a_module_are_refused():
    model = tiny_model()
    rates = {"mixture": None, "projector": 1e-4, "llm": 1e-3}
    freeze(model, rates)
    with pytest.raises(ValueError, match=r"no weight decay for projector.*; weight_decay has \['llm'\]"):
        parameter_groups(model, stage(rates, weight_decay={"llm": 0.1}))
    with pytest.raises(ValueError, match=r"weight_decay names \['lm'\], which match nothing; modules are \['llm'"):
        parameter_groups(model, stage(rates, weight_decay={"llm": 0.1, "projector": 0.0, "lm": 0.1}))


def test_learning_rates_are_peaks_times_scale():
    model = tiny_model()
    plan = stage({"mixture": 1e-4, "projector": None, "llm": 1e-3})
    freeze(model, plan.learning_rates)
    assert set_learning_rates(adamw(model, plan), 0.5) == {"mixture": 5e-5, "llm": 5e-4}


def test_everything_frozen_is_refused():
    model = tiny_model()
    plan = stage({"mixture": None, "projector": None, "llm": None})
    freeze(model, plan.learning_rates)
    with pytest.raises(ValueError, match="nothing would be trained"):
        adamw(model, plan)


def test_the_freeze_table_counts_every_parameter():
    model = tiny_model()
    rates = {"mixture": None, "projector": 2e-3, "llm": None}
    rows = {row.module: row for row in freeze_table(model, rates)}
    assert set(rows) == {"mixture", "mixture.encoders.vit", "mixture.encoders.convnext", "projector", "llm"}
    assert sum(row.total for row in rows.values()) == sum(p.numel() for p in model.parameters())
    assert rows["projector"].trainable == rows["projector"].total and rows["projector"].learning_rate == 2e-3
    assert rows["llm"].trainable == 0 and rows["llm"].learning_rate is None and rows["llm"].dtype == "float32"


def test_the_noise_of_a_row_is_seeded_by_its_stage_and_number():
    seeds = {stage({}, seed=seed).row_seed(row) for seed in (0, 1) for row in (-1, 0, 10**9)}
    assert len(seeds) == 6 and min(seeds) == 0


@pytest.mark.parametrize("given", [{"rows_per_step": 0}, {"max_length": 1}])
def test_a_step_has_a_row_and_a_row_two_tokens(given):
    values = {"recipe": "x", "learning_rates": {}, "max_length": 2, "rows_per_step": 1, "num_steps": 3}
    assert Stage(**values).rows_per_step == 1
    with pytest.raises(ValueError, match="are too small"):
        Stage(**values | given)


@pytest.mark.parametrize("norm", [0, -1.0])
def test_gradients_are_not_clipped_to_nothing(norm):
    with pytest.raises(ValueError, match=rf"max_grad_norm is {norm}; .* null"):
        stage({}, max_grad_norm=norm)
    assert stage({}, max_grad_norm=None).max_grad_norm is None


@pytest.mark.parametrize("given", [{"num_steps": None}, {"num_epochs": 1}])
def test_a_stage_has_steps_or_epochs(given):
    values = {"recipe": "x", "learning_rates": {}, "max_length": 8, "rows_per_step": 1, "num_steps": 3} | given
    with pytest.raises(ValueError, match="num_steps"):
        Stage(**values)


@pytest.mark.parametrize(
    "given", [{"warmup_ratio": 3}, {"warmup_ratio": -0.1}, {"min_lr_ratio": 10}, {"warmup_steps": -1}]
)
def test_shares_of_a_schedule_are_shares(given):
    """A warm-up of 3, meant as percent or steps, would end beyond the last step."""
    values = {"recipe": "x", "learning_rates": {}, "max_length": 8, "rows_per_step": 1, "num_steps": 3}
    Stage(**values, warmup_ratio=1, min_lr_ratio=1, warmup_steps=0)
    with pytest.raises(ValueError, match="are shares, from 0 to 1"):
        Stage(**values, **given)
