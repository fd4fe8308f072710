"""Two ranks give what one gives; ZeRO gives what plain torch gives."""

import time

import pytest
import torch

from eagle_train.__main__ import main
from eagle_train.track.jsonl import read_metrics
from eagle_train.train.app import train
from eagle_train.train.load import export_run, load_model
from tests.runs import config, fork, gradient_norms, losses, must_run, overrides, rows

WEIGHTS = "data.loss_weight.path=eagle_train.data.loss_weights.square_root"  # samples weigh unlike their tokens
ROWS = ("schedule.pretrain.rows_per_step=3", "schedule.sft.rows_per_step=4", WEIGHTS)

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    """Plain torch on one rank, four micro-batches per step."""
    run = tmp_path_factory.mktemp("one_rank")
    assert train(config(data, run, *ROWS))
    return run


def assert_same(run, expected):
    assert losses(run) == pytest.approx(losses(expected), abs=1e-5)
    # Adam and clipping hide a wrong scale of the gradient from the losses.
    assert gradient_norms(run) == pytest.approx(gradient_norms(expected), rel=1e-4)
    assert rows(run) == rows(expected)


# Every weight is sharded, and ranks compute the losses of a row in unlike numbers of pieces.
SHARDED = ("engine=zero3", "engine.persistence_threshold=0", "loss.chunk=16")
ENGINES = {"plain": (), "zero1": ("engine=zero2", "engine.zero_stage=1"), "zero2": ("engine=zero2",), "zero3": SHARDED}


# ZeRO-3 on two ranks is below.
@pytest.mark.parametrize(("engine", "ranks"), [("plain", 2), ("zero1", 2), ("zero2", 1), ("zero2", 2), ("zero3", 1)])
def test_any_engine_on_any_ranks_equals_plain_torch_on_one(data, one_rank, tmp_path, engine, ranks):
    must_run(overrides(data, tmp_path, *ROWS, *ENGINES[engine]), ranks=ranks)
    assert_same(tmp_path, one_rank)


LONG = (*ROWS, "schedule.sft.num_steps=15", "save_every=100")  # so that a signal comes in the middle


@pytest.fixture(scope="module")
def long(data, tmp_path_factory):
    """A longer run of plain torch on one rank."""
    run = tmp_path_factory.mktemp("long")
    assert train(config(data, run, *LONG))
    return run


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero_resumes_and_exports(data, long, tmp_path, engine):
    arguments = overrides(data, tmp_path / "run", *LONG, *ENGINES[engine])
    process = fork(arguments)
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    must_run(arguments)
    assert losses(tmp_path / "run") == pytest.approx(losses(long), abs=1e-4)
    export_run(tmp_path / "run", tmp_path / "export")
    ours, _ = load_model(tmp_path / "export")
    plain, _ = load_model(long)
    for name, weight in ours.state_dict().items():
        assert torch.allclose(weight, plain.state_dict()[name], atol=1e-3), name


def test_two_ranks_of_zero_3_equal_plain_torch_and_their_shards_evaluate_as_one_model(data, one_rank, tmp_path, capsys):
    evaluated = ("evaluation=toy", "evaluation.sources=[small_all]", "evaluation.gallery_per_type=1")
    must_run(overrides(data, tmp_path, *ROWS, *SHARDED, *evaluated), ranks=2)
    assert_same(tmp_path, one_rank)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert 0.0 <= last["eval/exact_match/simple"] <= 1.0
    ours, _ = load_model(tmp_path)
    theirs, _ = load_model(one_rank)
    for name, weight in ours.state_dict().items():
        assert torch.allclose(weight, theirs.state_dict()[name], atol=1e-3), name
    assert main(["chat", str(tmp_path), "Say yes.", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "export")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "export")
