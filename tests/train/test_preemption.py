"""When a run saves and ends before its time is over, and that it asks to be run again."""

import os
import signal
import time

import pytest

from eagle_train.train.app import train
from eagle_train.train.preemption import PreemptionFlag
from tests.runs import config, losses, make_data, rows


@pytest.fixture
def flag():
    """Returns what makes a flag for a job that ends in so many seconds."""
    made = []

    def make(*left, **settings):
        ends = [None if seconds is None else time.time() + seconds for seconds in left]
        made.append(PreemptionFlag(**settings, end_time=lambda: ends.pop(0) if len(ends) > 1 else ends[0]))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_signal_is_remembered_and_handlers_are_restored(flag):
    before = signal.getsignal(signal.SIGUSR1)
    one = flag(None)
    assert not one.asked()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert one.asked() and one.signal == signal.SIGUSR1
    one.close()
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(("left", "asked"), [(151, False), (149, True), (None, False)])
def test_time_is_short_when_it_is_less_than_the_margin_and_a_save(flag, left, asked):
    assert flag(left, margin_seconds=60, save_seconds=90).asked() == asked


def test_the_longest_measured_save_counts_in_place_of_the_assumed_one(flag):
    one = flag(100, margin_seconds=10, save_seconds=120)
    one.saved(50)
    one.saved(20)
    assert not one.asked()
    one.saved(95)
    assert one.asked()


def test_two_more_steps_must_fit(flag, monkeypatch):
    one = flag(1000, margin_seconds=10, save_seconds=10)
    clock = time.time()
    monkeypatch.setattr("time.time", lambda: clock)
    assert not one.asked()
    clock += 400  # a step of 400 s: 600 s are left, 820 are needed
    assert one.asked()


def test_making_a_stage_ready_is_no_step(flag, monkeypatch):
    one = flag(1000, margin_seconds=10, save_seconds=10)
    clock = time.time()
    monkeypatch.setattr("time.time", lambda: clock)
    assert not one.asked()
    clock += 400
    one.begin_stage()
    assert not one.asked()


def test_checkpoints_of_a_stage_are_taken_to_last_as_long_as_guessed_until_one_is_measured(flag):
    one = flag(100, margin_seconds=10, save_seconds=120)
    one.saved(5)
    assert not one.asked()
    one.begin_stage()
    assert one.asked(), "the next stage may save more than a projector"
    one.saved(5)
    assert not one.asked()
    one.saved(70)
    one.begin_stage()
    one.saved(5)
    assert not one.asked()


def test_a_limit_that_was_extended_counts(flag):
    one = flag(5, 5000, margin_seconds=60, save_seconds=1)
    assert not one.asked()


def test_a_scheduler_that_no_longer_answers_does_not_prolong_the_job(flag):
    one = flag(5, None, margin_seconds=60, save_seconds=1)
    assert one.asked()


def test_a_measured_save_takes_the_place_of_the_guess_and_the_longest_counts(flag):
    assert flag(100, margin_seconds=0, save_seconds=200).asked()
    one = flag(100, margin_seconds=0, save_seconds=200)
    one.saved(3.0)
    assert not one.asked()
    one.saved(150.0)
    one.saved(2.0)
    assert one.asked()


def test_a_save_that_is_being_written_must_fit_too(flag):
    one = flag(100, margin_seconds=10, save_seconds=60)
    assert not one.asked()
    one.writing = lambda: True
    assert one.asked()


@pytest.mark.slow
def test_a_run_stops_before_the_wall_time_requeues_itself_and_goes_on_as_if_nothing_had_happened(
    data, undisturbed, tmp_path, monkeypatch
):
    programs = tmp_path / "bin"
    programs.mkdir()
    said = tmp_path / "said"
    line = f"JobId=7 JobState=RUNNING EndTime={int(time.time()) + 90}"
    scontrol = programs / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $SLURM_TIME_FORMAT $* >>{said}\necho {line}\n")
    scontrol.chmod(0o755)
    mine = config(data, tmp_path / "run", "save_every=1000")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        patch.setenv("SLURM_JOB_ID", "7")
        assert not train(mine), "90 s are left, 180 needed"
    assert len(losses(tmp_path / "run")) == 1
    calls = said.read_text().splitlines()
    assert calls[0] == "%s show job --oneliner 7" and calls[-1] == "%s requeue 7"
    assert train(mine)
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert rows(tmp_path / "run") == rows(undisturbed)


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_while_its_data_are_indexed_stops_there(tmp_path, monkeypatch, caplog):
    data = make_data(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(PreemptionFlag, "wanted", lambda self: True)
        assert not train(config(data, tmp_path / "run"))
    assert "preempted before step 0 of stage pretrain" in caplog.text
    assert not list(data.rglob("*.layout-*")) and not list(data.rglob("*.claim"))
    assert train(config(data, tmp_path / "run"))
    assert len(losses(tmp_path / "run")) == 9
