"""Every second of a run is in one phase, over all its starts, whatever ended them."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from eagle_train.track.goodput import Goodput, process_started
from eagle_train.track.timeline import PHASES, in_words, read_timeline


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


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


def kill(goodput):
    """What SIGKILL leaves: nothing more is written."""
    goodput._file.close()
    goodput._stopped.set()


def train(goodput, clock, first, last, *, wait=1.0, step=3.0):
    with goodput.phase("training"):
        for number in range(first + 1, last + 1):
            with goodput.phase("data_wait"):
                clock.pass_(wait)
            clock.pass_(step)
            goodput.reach(number)


def save(goodput, clock, seconds=2.0):
    goodput.saved()
    with goodput.phase("checkpoint"):
        clock.pass_(seconds)


def seconds_of(path):
    return {name: value for name, value in read_timeline(path).totals().items() if value}


def test_phases_add_up_to_the_time_since_the_start(begin, clock, tmp_path):
    goodput = begin(started=990.0)  # imports took ten seconds
    clock.pass_(5.0)
    with goodput.phase("data"):
        clock.pass_(7.0)
        with goodput.phase("resume"):
            clock.pass_(1.0)
        clock.pass_(2.0)
    train(goodput, clock, 0, 4)
    with goodput.phase("training"):
        save(goodput, clock)
    with goodput.phase("evaluation"):
        clock.pass_(6.0)
    found = {name: value for name, value in goodput.seconds().items() if value}
    assert found == {
        "startup": 15.0,
        "data": 9.0,
        "resume": 1.0,
        "training": 12.0,
        "data_wait": 4.0,
        "checkpoint": 2.0,
        "evaluation": 6.0,
    }
    assert sum(found.values()) == 10 + clock.now
    goodput.close()
    assert seconds_of(tmp_path / "goodput.jsonl") == found
    assert goodput.metrics()["perf/goodput"] == pytest.approx(12 / 49)
    assert goodput.metrics()["perf/checkpoint_stall_share"] == pytest.approx(2 / 49)


def test_after_a_kill_redone_steps_are_lost_and_the_time_between_is_down(begin, clock, tmp_path):
    first = begin()
    clock.pass_(10.0)
    first.resumed(0)
    train(first, clock, 0, 3)
    save(first, clock)
    train(first, clock, 3, 5)  # 8 s: done again later
    with first.phase("training"):
        clock.pass_(1.5)  # in the middle of a step
        with first._lock:
            first._write()  # the thread's line
        clock.pass_(2.5)  # never told
        kill(first)
    clock.pass_(100.0)
    second = begin()
    clock.pass_(4.0)
    second.resumed(3)
    train(second, clock, 3, 6)
    second.close()
    found = seconds_of(tmp_path / "goodput.jsonl")
    assert found == {
        "startup": 14.0,
        "training": 3 * 6.0,
        "data_wait": 6.0,
        "checkpoint": 2.0,
        "lost": 2 * 4.0 + 1.5,
        "down": 2.5 + 100.0,
    }
    assert sum(found.values()) == clock.now
    timeline = read_timeline(tmp_path / "goodput.jsonl")
    assert [dict(start) for start in timeline.starts][1] == {"startup": 4.0, "training": 9.0, "data_wait": 3.0}
    assert timeline.end - timeline.begin == clock.now


def test_a_run_killed_before_its_first_checkpoint_loses_all_its_steps(begin, clock, tmp_path):
    first = begin()
    first.resumed(0)
    train(first, clock, 0, 2)
    first.close()
    second = begin()
    second.resumed(0)
    train(second, clock, 0, 2)
    second.close()
    assert seconds_of(tmp_path / "goodput.jsonl") == {"lost": 8.0, "training": 6.0, "data_wait": 2.0}


def test_a_preempted_run_that_saved_loses_nothing(begin, clock, tmp_path):
    first = begin()
    first.resumed(0)
    train(first, clock, 0, 2)
    save(first, clock)
    first.close()
    clock.pass_(50.0)
    second = begin()
    second.resumed(2)
    found = second.seconds()
    assert (found["training"], found["down"]) == (6.0, 50.0), "the start before counts while the run goes on too"
    second.close()
    assert seconds_of(tmp_path / "goodput.jsonl") == {
        "training": 6.0,
        "data_wait": 2.0,
        "checkpoint": 2.0,
        "down": 50.0,
    }


def test_going_back_to_an_older_checkpoint_loses_what_came_after_it(begin, clock, tmp_path):
    """Also within one start, as after a spike of the loss; steps are lost once, however often they are redone."""
    goodput = begin()
    goodput.resumed(0)
    for first in (0, 2, 4):
        train(goodput, clock, first, first + 2)
        goodput.saved()
    goodput.resumed(2)
    train(goodput, clock, 2, 4)
    goodput.resumed(2)
    train(goodput, clock, 2, 4)
    goodput.close()
    assert seconds_of(tmp_path / "goodput.jsonl") == {"lost": 24.0, "training": 12.0, "data_wait": 4.0}


def test_steps_within_a_line_share_its_seconds(begin, clock, tmp_path):
    goodput = begin()
    goodput.resumed(0)
    train(goodput, clock, 0, 10)
    goodput.resumed(4)
    assert goodput.seconds()["lost"] == pytest.approx(6 * 4.0)
    assert goodput.seconds()["training"] == pytest.approx(4 * 3.0)


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


def test_clocks_of_nodes_that_disagree_do_not_make_time_negative(begin, clock, tmp_path):
    first = begin()
    clock.pass_(30.0)
    first.close()
    begin(started=900.0)
    found = seconds_of(tmp_path / "goodput.jsonl")
    assert min(found.values()) >= 0 and found["startup"] == 30.0


def test_without_a_file_nothing_is_written_and_all_is_counted(clock):
    goodput = Goodput(clock=clock)
    train(goodput, clock, 0, 1)
    assert goodput.seconds()["training"] == 3.0
    goodput.close()


def test_in_words_names_what_took_the_time(begin, clock):
    goodput = begin()
    train(goodput, clock, 0, 2)
    save(goodput, clock)
    assert in_words(goodput.seconds()) == "goodput 60.0% of 10 s; waiting for rows 20.0%, checkpoint stall 20.0%"
    assert set(goodput.seconds()) == set(PHASES)


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


def test_a_process_began_before_now():
    assert 0 <= time.time() - process_started() < 1e6
