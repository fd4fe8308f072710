"""Ranks that share rows give what one process gives: loss, every gradient, every count."""

import pytest
import torch

from eagle_train.track.jsonl import read_metrics
from eagle_train.train.app import train
from tests.runs import accounts, config, gradient_norms, losses, must_run, overrides, rows
from tests.sequence_ranks import CASES, MLP_ALONE, TRAINED, aligned, gradients_of, trained
from tests.toys import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What four ranks did."""
    out = tmp_path_factory.mktemp("sequence")
    must_run([str(out)], ranks=4, module="tests.sequence_ranks")
    return torch.load(out / "results.pt", weights_only=True)


def assert_same(found, expected, *, tolerance):
    counts, gradients = found
    expected_counts, expected_gradients = expected
    assert counts == pytest.approx(expected_counts, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert torch.allclose(gradients[name], gradient, rtol=0, atol=tolerance), name


@pytest.mark.parametrize(("tiles", "llm", "size"), CASES)
def test_a_shared_row_has_the_loss_and_every_gradient_of_a_whole_one(results, tiles, llm, size):
    expected = gradients_of(tiles, llm, 1)
    assert expected[1].keys() == {name for name, _ in tiny_model().named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    assert_same(results[f"{tiles}/{llm}/{size}"], expected, tolerance=1e-6 * max(1.0, largest))


@pytest.mark.parametrize(("engine", "size"), TRAINED)
def test_every_engine_trains_shared_rows_as_plain_torch_trains_whole_ones(results, engine, size):
    assert_same(results[f"{engine}/{size}"], trained("recomputed", 1), tolerance=1e-4)


def test_a_tiled_mlp_behind_frozen_layers_is_trained_by_zero_3(results):
    assert_same(results["mlp"], trained("recomputed", 1, rates=MLP_ALONE), tolerance=1e-4)


def test_an_encoder_is_aligned_on_shared_rows_as_on_whole_ones(results):
    assert_same(results["aligned"], aligned(1), tolerance=1e-6)


WEIGHTS = "data.loss_weight.path=eagle_train.data.loss_weights.square_root"  # samples weigh unlike their tokens
ROWS = ("schedule.pretrain.rows_per_step=2", "schedule.sft.rows_per_step=3", WEIGHTS)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A run of plain torch on one rank."""
    run = tmp_path_factory.mktemp("alone")
    assert train(config(data, run, *ROWS))
    return run


def assert_same_run(run, alone):
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
    assert gradient_norms(run) == pytest.approx(gradient_norms(alone), rel=1e-4)
    assert rows(run) == rows(alone)
    assert accounts(run) == accounts(alone)
    records = [read_metrics(folder / "metrics.jsonl") for folder in (run, alone)]
    seen = [[r["train/tokens_seen"] for r in of_run if "train/tokens_seen" in r] for of_run in records]
    assert seen[0] == seen[1] and seen[0][-1] > 0


def test_a_run_on_shared_rows_has_the_curve_and_the_books_of_one_rank(data, alone, tmp_path):
    must_run(overrides(data, tmp_path, *ROWS, "engine=zero3", "engine.sequence_parallel=2"), ranks=2)
    assert_same_run(tmp_path, alone)


def test_a_run_goes_on_with_another_number_of_ranks_to_a_row(data, alone, tmp_path):
    must_run(overrides(data, tmp_path, *ROWS, "~schedule.sft", "engine.sequence_parallel=2"), ranks=2)
    assert len(losses(tmp_path)) == 3
    assert train(config(data, tmp_path, *ROWS))
    assert_same_run(tmp_path, alone)
