"""Work gives the same in one process and in several, and an error of one reaches the caller."""

import operator
from functools import partial

import pytest

from eagle_train.data.work_pool import open_pool, run_all


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


def test_no_process_is_started_that_has_nothing_to_do():
    with open_pool(abs, 1000) as pool:
        assert (pool.size, pool.busy) == (1000, 0)
    assert list(run_all(abs, [], 3)) == []


def test_no_process_is_refused():
    with pytest.raises(ValueError, match="workers is 0"):
        next(run_all(abs, [1], 0))
