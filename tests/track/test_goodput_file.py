"""The file of a run's seconds: torn, full, damaged, or written by two."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from eagle_train.track.goodput import Goodput
from eagle_train.track.timeline import read_timeline
from tests.track.goodputs import seconds_of, train


def test_a_torn_line_and_a_full_disk_lose_no_start(begin, clock, tmp_path):
    path = tmp_path / "goodput.jsonl"
    first = begin()
    clock.pass_(3.0)
    first.close()
    with path.open("a") as file:
        file.write('{"step": 1, "seco')
    clock.pass_(2.0)
    second = begin()
    clock.pass_(4.0)
    second.close()
    assert seconds_of(path) == {"startup": 7.0, "down": 2.0}


def test_a_line_that_could_not_be_written_is_written_later(begin, clock, tmp_path, caplog):
    class Full:
        def __init__(self, file):
            self.file, self.room, self.name, self.closed = file, 5, file.name, False

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            written, self.room = self.file.write(data[: self.room]), 0
            return written

        def fileno(self):
            return self.file.fileno()

    goodput = begin()
    real = goodput._file
    goodput._file = Full(real)
    clock.pass_(3.0)
    goodput.resumed(0)
    assert "No space left" in caplog.text
    goodput._file = real
    clock.pass_(4.0)
    goodput.close()
    assert seconds_of(tmp_path / "goodput.jsonl") == {"startup": 7.0}


def test_of_two_processes_that_run_it_at_once_the_later_one_writes(begin, clock, tmp_path, caplog):
    """Otherwise the same seconds count twice."""
    first = begin()
    first.resumed(0)
    train(first, clock, 0, 1)
    first.saved()
    second = begin()
    second.resumed(1)
    train(second, clock, 1, 3)
    train(first, clock, 1, 2)  # at the same time, which counts as that of the second
    first.saved()
    second.close()
    first.close()
    timeline = read_timeline(tmp_path / "goodput.jsonl")
    assert sum(timeline.totals().values()) == timeline.end - timeline.begin == clock.now
    assert seconds_of(tmp_path / "goodput.jsonl")["training"] == 3 * 3.0
    assert caplog.text.count("another start of this run writes") == 1


def test_a_damaged_first_line_keeps_no_run_from_starting(begin, clock, tmp_path):
    path = tmp_path / "goodput.jsonl"
    path.write_text('\0\0\0\n{"step": 3, "seconds": {"training": 9.0}}\n')
    begin()
    clock.pass_(2.0)
    begin().close()
    assert read_timeline(path).begin == 1000.0


def test_a_full_disk_is_said_once(begin, caplog, monkeypatch):
    goodput = begin()
    full = SimpleNamespace(write=lambda data: os.write(-1, data), fileno=goodput._file.fileno, name="f", closed=False)
    real, goodput._file = goodput._file, full
    for _ in range(3):
        goodput.saved()
    assert caplog.text.count("cannot write f") == 1
    goodput._file = real


SCRIPT = """
import sys, time
from pathlib import Path
from eagle_train.track.goodput import Goodput, process_started
goodput = Goodput(Path(sys.argv[1]), started=process_started(), every_seconds=0.05)
goodput.resumed(0)
with goodput.phase("training"):
    for step in range(10**6):
        with goodput.phase("data_wait"):
            time.sleep(0.001)
        time.sleep(0.004)
        goodput.reach(step + 1)
"""


@pytest.mark.slow
def test_a_process_killed_with_sigkill_leaves_all_but_its_last_moment(tmp_path):
    path = tmp_path / "goodput.jsonl"
    began = time.time()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], env=os.environ)
    while not path.exists() or path.read_bytes().count(b"training") < 5:
        assert process.poll() is None and time.time() - began < 120
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = time.time()
    with path.open("ab") as file:
        file.write(b'{"step": 9')
    after = Goodput(path)
    after.resumed(0)
    after.close()
    timeline = read_timeline(path)
    found = timeline.totals()
    assert sum(found.values()) == pytest.approx(timeline.end - timeline.begin, abs=1e-4)
    assert timeline.end == pytest.approx(time.time(), abs=5) and timeline.begin == pytest.approx(began, abs=5)
    assert found["startup"] > 0.1 and found["lost"] > 0.1 and found["training"] < 0.1
    assert found["down"] >= 0 and killed - timeline.begin == pytest.approx(found["startup"] + found["lost"], abs=5)
    assert json.loads(path.read_bytes().splitlines()[0]).keys() == {"start"}
