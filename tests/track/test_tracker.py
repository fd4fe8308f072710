"""Trackers hands everything to every tracker, in order, and closes all of them."""

import pytest

from eagle_train.track.tracker import Trackers


class Recorder:
    def __init__(self, calls, name, fails=False):
        self.calls, self.name, self.fails = calls, name, fails

    def begin_stage(self, stage, step, num_steps):
        self.calls.append((self.name, stage, step, num_steps))

    def log(self, metrics, step):
        self.calls.append((self.name, metrics, step))

    def close(self, *, failed=False):
        self.calls.append((self.name, "failed" if failed else "close"))
        if self.fails:
            raise OSError("disk full")


def test_every_tracker_gets_every_call_in_order():
    calls = []
    trackers = Trackers([Recorder(calls, "a"), Recorder(calls, "b")])
    trackers.begin_stage("sft", 3, 10)
    trackers.log({"train/loss": 1.0}, 4)
    trackers.close()
    kinds = [("sft", 3, 10), ({"train/loss": 1.0}, 4), ("close",)]
    assert calls == [(name, *call) for call in kinds for name in "ab"]


def test_a_tracker_that_fails_to_close_does_not_keep_the_others_open():
    calls = []
    trackers = Trackers([Recorder(calls, "a", fails=True), Recorder(calls, "b")])
    with pytest.raises(OSError, match="disk full"):
        trackers.close()
    assert calls == [("a", "close"), ("b", "close")]


def test_every_tracker_is_told_of_a_failure():
    calls = []
    Trackers([Recorder(calls, "a"), Recorder(calls, "b")]).close(failed=True)
    assert calls == [("a", "failed"), ("b", "failed")]


def test_no_trackers_accept_every_call():
    trackers = Trackers([])
    trackers.begin_stage("sft", 0, 1)
    trackers.log({"train/loss": 1.0}, 1)
    trackers.close()
    assert trackers == []
