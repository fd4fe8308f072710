"""A whole run: what its end counts as."""

from types import SimpleNamespace

from eagle_train.track.goodput import Goodput
from eagle_train.train import app
from eagle_train.train.heartbeat import Heart


def test_what_follows_the_last_stage_is_no_start_up(monkeypatch):
    """W&B may upload for minutes, and a profile takes long to write."""
    now = [0.0]
    goodput = Goodput(clock=lambda: now[0])

    def last(seconds):
        now[0] += seconds

    monkeypatch.setattr(app, "run_stage", lambda run, stage: True)
    monkeypatch.setattr(app, "finish", lambda run: last(3.0))
    run = SimpleNamespace(
        schedule={"sft": None},
        state=SimpleNamespace(stage="sft", global_step=1),
        preempted=SimpleNamespace(close=lambda: None),
        heart=Heart(),
        goodput=goodput,
        trackers=SimpleNamespace(close=lambda: last(20.0)),
        profiler=SimpleNamespace(close=lambda: last(40.0)),
    )
    assert app.run_stages(run)
    found = {name: seconds for name, seconds in goodput.seconds().items() if seconds > 1}
    assert found == {"evaluation": 3.0, "other": 60.0}
    goodput.close()
