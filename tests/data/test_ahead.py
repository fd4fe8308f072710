import gc
import threading
import time

import pytest

from eagle_train.data.ahead import HELD, ahead


def numbers(made, end=6, error=None):
    """Yields numbers, noting which were asked for, and that it was closed."""
    try:
        for number in range(end):
            made.append(number)
            yield number
        if error:
            raise error
    finally:
        made.append("closed")


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_items_come_in_order_and_the_end_too():
    made = []
    assert list(ahead(numbers(made))) == list(range(6))
    assert made == [*range(6), "closed"]


def test_the_next_item_is_made_while_the_last_is_in_use_and_no_more_than_held():
    made = []
    items = ahead(numbers(made, end=100))
    assert next(items) == 0
    wait_for(lambda: len(made) == HELD + 1)  # in use, waiting, and being handed over
    time.sleep(0.05)
    assert len(made) == HELD + 1
    items.close()
    assert made[-1] == "closed"


def test_an_error_comes_after_the_items_before_it():
    items = ahead(numbers([], end=3, error=OSError("a disk")))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="a disk"):
        next(items)


@pytest.mark.parametrize("taken", [1, 3])
def test_closing_ends_the_thread_and_closes_the_items(taken):
    made = []
    items = ahead(numbers(made, end=100))
    for _ in range(taken):
        next(items)
    items.close()
    assert made[-1] == "closed"
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_forgetting_it_closes_the_items():
    made = []
    items = ahead(numbers(made, end=100))
    next(items)
    del items
    gc.collect()
    assert made[-1] == "closed"
