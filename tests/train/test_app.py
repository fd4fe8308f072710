"""A whole run: what its end counts as, and who is told how it ended."""

from types import SimpleNamespace

import pytest

from eagle_train.track.goodput import Goodput
from eagle_train.train import app
from eagle_train.train.heartbeat import Heart


def run_of(goodput, close_trackers, close_profiler):
    """Returns a run of one stage."""
    return SimpleNamespace(
        schedule={"sft": None},
        state=SimpleNamespace(stage="sft", global_step=1),
        preempted=SimpleNamespace(close=lambda: None),
        heart=Heart(),
        goodput=goodput,
        trackers=SimpleNamespace(close=close_trackers),
        profiler=SimpleNamespace(close=close_profiler),
    )


def test_what_follows_the_last_stage_is_no_start_up(monkeypatch):
    """W&B may upload for minutes, and a profile takes long to write."""
    now = [0.0]
    goodput = Goodput(clock=lambda: now[0])

    def last(seconds):
        now[0] += seconds

    monkeypatch.setattr(app, "run_stage", lambda run, stage: True)
    monkeypatch.setattr(app, "finish", lambda run: last(3.0))
    assert app.run_stages(run_of(goodput, lambda failed: last(20.0), lambda: last(40.0)))
    found = {name: seconds for name, seconds in goodput.seconds().items() if seconds > 1}
    assert found == {"evaluation": 3.0, "other": 60.0}
    goodput.close()


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt()])
def test_trackers_are_told_whether_the_run_failed(monkeypatch, error):
    def run_stage(run, stage):
        if error is not None:
            raise error
        return False  # asked to stop

    monkeypatch.setattr(app, "run_stage", run_stage)
    monkeypatch.setattr(app, "after_preemption", lambda run: "")
    told, goodput = [], Goodput()
    run = run_of(goodput, lambda failed: told.append(failed), lambda: None)
    if error is None:
        assert app.run_stages(run) is False
    else:
        with pytest.raises(type(error)):
            app.run_stages(run)
    assert told == [error is not None]
    goodput.close()
