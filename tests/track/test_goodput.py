"""Every second of a run is in one phase, over all its starts, whatever ended them."""

import time

import pytest

from eagle_train.track.goodput import Goodput, process_started
from eagle_train.track.timeline import PHASES, in_words, read_timeline
from tests.track.goodputs import kill, save, seconds_of, train


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


def test_a_process_began_before_now():
    assert 0 <= time.time() - process_started() < 1e6
