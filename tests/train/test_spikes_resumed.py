"""A run that was stopped judges the losses after its return by those before, as if it had never been stopped."""

import pytest

from eagle_train.train.anomalies import AnomalyGuard, AnomalyPolicy
from eagle_train.train.checkpoint import TrainState, read_state, state_files

LOSSES = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.1]
POLICY = AnomalyPolicy(spike_deviations=4.0, window=8)


def guard_of(state):
    """The guard of a stage, made of a run's state as `make_guard` does."""
    return AnomalyGuard(policy=POLICY, stage="sft", losses=state.recent_losses)


def written(state, folder):
    """Returns the state after a checkpoint of it was written and read."""
    folder.mkdir()
    for name, content in state_files(state, "", {}).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_state(folder)


@pytest.mark.parametrize("stop", [3, 8])
def test_a_spike_is_one_after_a_resume_too_and_the_limit_is_the_same(tmp_path, stop):
    undisturbed = TrainState(stage="sft", run_id="x")
    for loss in LOSSES:
        assert guard_of(undisturbed).judge(loss) is None
    state = TrainState(stage="sft", run_id="x")
    for loss in LOSSES[:stop]:
        guard_of(state).judge(loss)
    resumed = written(state, tmp_path / "checkpoint")
    assert resumed.recent_losses == LOSSES[:stop]
    for loss in LOSSES[stop:]:
        guard_of(resumed).judge(loss)
    assert POLICY.limit(resumed.recent_losses) == POLICY.limit(undisturbed.recent_losses)
    assert guard_of(resumed).judge(5.0) == guard_of(undisturbed).judge(5.0) == "spike"
    assert guard_of(TrainState(stage="sft", run_id="x")).judge(5.0) is None  # it is the remembered losses that tell
