"""Jobs give the same in one process and in several, and an error of one reaches the caller."""

import operator

import pytest

from eagle_train.data.jobs import run_jobs


def test_jobs_are_done_one_after_another_and_only_as_they_are_asked_for():
    items = iter(range(5))
    results = run_jobs(operator.mul, 3, items, 1)
    assert next(results) == (0, 0) and next(results) == (1, 3)
    assert list(items) == [2, 3, 4]


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    assert sorted(run_jobs(operator.mul, 3, iter(range(20)), 2)) == list(run_jobs(operator.mul, 3, range(20), 1))
    with pytest.raises(ZeroDivisionError):
        list(run_jobs(operator.floordiv, 3, [1, 0, 2], 2))


def test_no_process_is_refused():
    with pytest.raises(ValueError, match="workers is 0"):
        next(run_jobs(operator.mul, 3, [1], 0))
