"""Work gives the same in one process and in several, and an error of one reaches the caller."""

import operator
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from eagle_train.data.work_pool import open_pool, run_all

LEFT_OPEN = """
from time import sleep
from eagle_train.data.work_pool import Processes
if __name__ == "__main__":
    pool = Processes(sleep, 2)
    pool.begin("short", 0.0)
    assert pool.wait(None) == [("short", None)]
    pool.begin("long", 600.0)
    pool.begin("longer", 600.0)
    raise SystemExit(3)
"""


def test_items_are_done_one_after_another_and_only_as_they_are_asked_for():
    items = iter(range(5))
    results = run_all(partial(operator.mul, 3), items, 1)
    assert next(results) == (0, 0) and next(results) == (1, 3)
    assert list(items) == [3, 4]  # one is taken ahead


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    triple = partial(operator.mul, 3)
    assert sorted(run_all(triple, iter(range(20)), 2)) == list(run_all(triple, range(20), 1))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_its_item_and_tells_where_it_came_from(workers):
    with pytest.raises(ValueError, match=r"(?s)0 failed: ZeroDivisionError.*Traceback"):
        list(run_all(partial(operator.floordiv, 3), [1, 0, 2], workers))


def signal_itself(number: int) -> int:
    """Sends a signal to the process it runs in, and survives it if that process does."""
    os.kill(os.getpid(), number)
    return number


@pytest.mark.slow
def test_the_signals_of_a_scheduler_are_left_to_the_process_that_started_the_others():
    numbers = [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]
    assert sorted(run_all(signal_itself, numbers, 2)) == sorted((number, number) for number in numbers)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(numbers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, r"was ended by SIGKILL \(out of memory\?\); use fewer workers"),
        (signal.SIGUSR2, r"was ended by SIGUSR2$"),
        (signal.SIGRTMIN + 2, r"was ended by signal \d+$"),
    ],
)
def test_a_process_that_a_signal_ended_is_reported_with_its_name(number, said):
    with pytest.raises(ValueError, match=f"{int(number)} failed: the process at work on it {said}"):
        list(run_all(signal_itself, [int(number), 0], 2))


@pytest.mark.slow
def test_processes_at_work_are_stopped_when_the_caller_stops_or_ends(tmp_path):
    started = time.monotonic()
    with open_pool(time.sleep, 2) as pool:
        pool.begin("long", 600.0)
        pool.wait(1.0)
    (tmp_path / "left_open.py").write_text(LEFT_OPEN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, tmp_path / "left_open.py"], env=environment, timeout=60, check=False)
    assert done.returncode == 3 and time.monotonic() - started < 60


def test_no_process_is_started_that_has_nothing_to_do():
    with open_pool(abs, 1000) as pool:
        assert (pool.size, pool.busy) == (1000, 0)
    assert list(run_all(abs, [], 3)) == []


def test_no_process_is_refused():
    with pytest.raises(ValueError, match="workers is 0"):
        next(run_all(abs, [1], 0))
