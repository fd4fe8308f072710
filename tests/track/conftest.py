"""Starts of a run whose clock goes on when told."""

import time

import pytest

from eagle_train.track.goodput import Goodput
from tests.track.goodputs import Clock


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: 1000.0 + clock.now)
    return clock


@pytest.fixture
def begin(tmp_path, clock):
    """Starts of the run in one folder; `kill` leaves one without a last line."""
    opened = []

    def start(**options):
        opened.append(Goodput(tmp_path / "goodput.jsonl", clock=clock, every_seconds=3600.0, **options))
        return opened[-1]

    yield start
    for goodput in opened:
        goodput.close()
