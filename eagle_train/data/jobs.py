"""A job done for many items, in this process or in several; each process is sent what they share once."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeVar

AHEAD = 3
"""Jobs per process that are begun or wait; items may come from a file of any size."""
Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def open_pool(workers: int) -> Iterator[Executor | None]:
    """Gives `workers` processes, or None for one: the work is done here then."""
    if workers == 1:
        yield None
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))  # a fork would copy threads of others
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def run_jobs(
    job: Callable[[Shared, Item], Result], shared: Shared, items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yields each item with `job(shared, item)`, in the order they are done; what is not begun is left at an error.

    Args:
        job: a function of a module, that processes can find.
        shared: what all jobs need, such as a tokenizer.
        workers: processes, no more than there are items; one job alone is done here.

    Raises:
        ValueError: if `workers` is less than 1.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least 1 works")
    items = iter(items)
    begun = list(islice(items, workers))
    items = chain(begun, items)
    with open_pool(max(1, min(workers, len(begun)))) as pool:
        if pool is None:
            for item in items:
                yield item, job(shared, item)
            return
        frozen = pickle.dumps((job, shared))
        running: dict[Future, Item] = {}
        while True:
            for item in islice(items, AHEAD * workers - len(running)):
                running[pool.submit(run_frozen, frozen, item)] = item
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()


def run_frozen(frozen: bytes, item: Any) -> Any:
    """Returns the result of a job in a process."""
    job, shared = thaw(frozen)
    return job(shared, item)


@lru_cache(maxsize=1)
def thaw(frozen: bytes) -> tuple[Callable, Any]:
    """Returns job and shared object; loaded once per process, as a tokenizer takes a second."""
    return pickle.loads(frozen)
