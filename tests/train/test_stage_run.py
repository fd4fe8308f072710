"""What a stage asks of the run around it."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from eagle_train.track.goodput import Goodput
from eagle_train.track.tracker import Trackers
from eagle_train.train import checkpoint
from eagle_train.train.app import roll_back
from eagle_train.train.checkpoint import STATE, CheckpointDir, TrainState
from eagle_train.train.run_folder import read_attempts
from eagle_train.train.saving import Saver
from eagle_train.train.stage_run import can_return
from eagle_train.train.tensor_file import write_bytes


@pytest.fixture
def run(tmp_path):
    """A run in step 5 of a stage, with a checkpoint of step 3."""
    checkpoints = CheckpointDir(tmp_path / "checkpoints")
    aside, state = checkpoints.begin(3), TrainState(stage="sft", step=3, global_step=3, run_id="r")
    checkpoints.publish(aside, 3, {STATE: write_bytes(aside / STATE, json.dumps(asdict(state)).encode())})
    return SimpleNamespace(
        config={"tracker": {"wandb": None}, "name": "n"},
        text="",
        folder=tmp_path,
        saver=Saver(checkpoints),
        state=TrainState(stage="sft", step=5, global_step=5, run_id="r", config_hash="now"),
        resume_from=None,
        trackers=Trackers([]),
        goodput=Goodput(),
        profiler=None,
    )


def test_a_return_reads_the_checkpoint_once_to_see_whether_it_is_whole(run, monkeypatch):
    real, read = checkpoint.problem_of_ranks, []
    monkeypatch.setattr(checkpoint, "problem_of_ranks", lambda path, **how: read.append(path) or real(path, **how))
    assert can_return(run)
    roll_back(run)
    run.trackers.close()
    assert read == [run.resume_from] == [run.saver.checkpoints.path(3)]
    assert (run.state.step, run.state.config_hash) == (3, "now")
    assert [start["resumed_from"] for start in read_attempts(run.folder)] == ["step-00000003"]


def test_a_stage_whose_checkpoints_are_of_another_or_damaged_cannot_return(run):
    run.state.stage = "next"
    assert not can_return(run) and run.resume_from is None
    run.state.stage = "sft"
    (run.saver.checkpoints.path(3) / STATE).write_text("")
    assert not can_return(run) and run.resume_from is None, "it stops, and saves its state"
