"""Two ranks give what one gives; ZeRO-2 gives what plain torch gives."""

import time

import pytest
import torch

from eagle_train.train.app import train
from eagle_train.train.load import export_run, load_model
from tests.runs import config, gradient_norms, losses, must_run, overrides, rows, run_ranks, start

ROWS = ("schedule.pretrain.rows_per_step=3", "schedule.sft.rows_per_step=4")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    """Plain torch on one rank, four micro-batches per step."""
    run = tmp_path_factory.mktemp("one_rank")
    assert train(config(data, run, *ROWS))
    return run


def test_two_ranks_equal_one(data, one_rank, tmp_path):
    must_run(overrides(data, tmp_path, *ROWS), ranks=2)
    assert losses(tmp_path) == pytest.approx(losses(one_rank), abs=1e-5)
    # Adam and clipping hide a wrong scale of the gradient from the losses.
    assert gradient_norms(tmp_path) == pytest.approx(gradient_norms(one_rank), rel=1e-4)
    assert rows(tmp_path) == rows(one_rank)


@pytest.mark.parametrize(("zero_stage", "ranks"), [(1, 2), (2, 1), (2, 2)])
def test_zero_equals_plain_torch(data, one_rank, tmp_path, zero_stage, ranks):
    must_run(overrides(data, tmp_path, *ROWS, "engine=zero2", f"engine.zero_stage={zero_stage}"), ranks=ranks)
    assert losses(tmp_path) == pytest.approx(losses(one_rank), abs=1e-5)
    # Adam and clipping hide a wrong scale of the gradient from the losses.
    assert gradient_norms(tmp_path) == pytest.approx(gradient_norms(one_rank), rel=1e-4)
    assert rows(tmp_path) == rows(one_rank)


def test_zero_2_resumes_and_exports(data, tmp_path):
    long = (*ROWS, "schedule.sft.num_steps=25", "save_every=100")  # so that the signal comes in the middle
    assert train(config(data, tmp_path / "plain", *long))
    arguments = overrides(data, tmp_path / "run", *long, "engine=zero2")
    process = start(arguments)
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    must_run(arguments)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    export_run(tmp_path / "run", tmp_path / "export")
    ours, _ = load_model(tmp_path / "export")
    plain, _ = load_model(tmp_path / "plain")
    for name, weight in ours.state_dict().items():
        assert torch.allclose(weight, plain.state_dict()[name], atol=1e-3), name


def test_zero_2_refuses_another_number_of_ranks_with_both_numbers(data, tmp_path):
    arguments = overrides(data, tmp_path, *ROWS, "engine=zero2", "schedule.sft.num_steps=1")
    must_run(arguments)
    longer = [*arguments, "schedule.sft.num_steps=2"]
    outputs = [output for _, output in run_ranks(longer, ranks=2)]
    assert all("holds ZeRO shards of 1 ranks, this run has 2" in output for output in outputs)
