"""Processes that do one thing to many items; they end with the process that started them, however it ends."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

LEFT_TO_THE_FIRST = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
"""Signals that reach all processes, Ctrl-C those of a terminal and a scheduler's those of a job; the one that started
the others answers them."""


class Pool(Protocol):
    """Does the work on items. Each has a key; the text of the key names the item in errors."""

    size: int
    """Items at once."""

    @property
    def busy(self) -> int:
        """Items begun whose end `wait` has not told yet."""

    def begin(self, key: Any, item: Any) -> None:
        """Begins an item; only if fewer than `size` are busy."""

    def wait(self, seconds: float | None) -> list[tuple[Any, Any]]:
        """Returns key and result of the items that are done since the last call.

        Args:
            seconds: to wait for one if any is busy; None: however long it takes.

        Raises:
            ValueError: names an item that failed.
        """


@contextmanager
def open_pool(job: Callable[[Item], Result], size: int) -> Iterator[Pool]:
    """Gives a pool of `size` processes; of one: this process, so that nothing is sent or started.

    Args:
        job: with all that it needs it is sent to each process once, when the process starts.
    """
    if size <= 1:
        yield Here(job)
        return
    pool = Processes(job, size)
    try:
        yield pool
    finally:
        pool.close()


def run_all(
    job: Callable[[Item], Result], items: Iterable[Item], workers: int, num_items: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """Yields each item with `job(item)`, in the order they are done; what is not begun is left if the caller stops.

    Args:
        job: a function of a module, or a `partial` of one, that processes can be sent.
        items: taken one by one, as processes get free: they may come from a file of any size.
        workers: processes.
        num_items: where it is known; there are no more processes than items.

    Raises:
        ValueError: names an item that failed, or if `workers` is less than 1.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least 1 works")
    with open_pool(job, workers if num_items is None else min(workers, num_items)) as pool:
        for item in items:
            while pool.busy == pool.size:
                yield from pool.wait(None)
            pool.begin(item, item)
        while pool.busy:
            yield from pool.wait(None)


class Here:
    """Does the work in this process, when its result is asked for."""

    size = 1

    def __init__(self, job: Callable[[Any], Any]) -> None:
        self._job = job
        self._begun: list[tuple[Any, Any]] = []

    @property
    def busy(self) -> int:
        """0 or 1."""
        return len(self._begun)

    def begin(self, key: Any, item: Any) -> None:
        """Notes an item."""
        self._begun.append((key, item))

    def wait(self, seconds: float | None) -> list[tuple[Any, Any]]:
        """Returns the item that was begun, done."""
        del seconds
        done = []
        while self._begun:
            key, item = self._begun.pop()
            try:
                done.append((key, self._job(item)))
            except Exception as error:
                raise failure(key, explain(error)) from error
        return done


class Processes:
    """Does the work in processes started afresh (a fork would copy threads of others), each when it is first needed.

    Each has a pipe of its own. When this process dies its end of the pipe closes, and the other process ends after what
    it is at work on; when the other one dies, this one notices in the same way.
    """

    def __init__(self, job: Callable[[Any], Any], size: int) -> None:
        self.size = size
        self._job = job
        self._processes: dict[Connection, BaseProcess] = {}
        self._keys: dict[Connection, Any] = {}
        # Before Python's own at the end, which sends SIGTERM, blocked in them, and then waits for them.
        atexit.register(self.close)

    @property
    def busy(self) -> int:
        """Items under way."""
        return len(self._keys)

    def begin(self, key: Any, item: Any) -> None:
        """Gives an item to a process that has none."""
        free = next((connection for connection in self._processes if connection not in self._keys), None)
        free = free or self._start()
        self._keys[free] = key
        try:
            free.send(item)
        except OSError as error:
            raise self._lost(free) from error

    def wait(self, seconds: float | None) -> list[tuple[Any, Any]]:
        """Returns what is done, see `Pool`."""
        done = []
        for connection in wait(list(self._keys), seconds):
            try:
                result, error = connection.recv()
            except (EOFError, OSError) as lost:
                raise self._lost(connection) from lost
            key = self._keys.pop(connection)
            if error is not None:
                raise failure(key, error)
            done.append((key, result))
        return done

    def _start(self) -> Connection:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(self._job, theirs), daemon=True)
        resource_tracker.ensure_running()  # else the first start would begin it, and that lets SIGINT through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_FIRST)  # the mask is inherited
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._processes[ours] = process
        return ours

    def _lost(self, connection: Connection) -> ValueError:
        process = self._processes[connection]
        process.join(1)
        return failure(self._keys[connection], f"the process at work on it {how_it_ended(process.exitcode)}")

    def close(self) -> None:
        """Ends the processes; one that is at work is stopped."""
        atexit.unregister(self.close)
        for connection, process in self._processes.items():
            connection.close()
            if connection in self._keys:
                process.kill()
        for process in self._processes.values():
            process.join()


def serve(job: Callable[[Any], Any], connection: Connection) -> None:
    """Works on what comes through the pipe until it closes; answers with the result and None, or what went wrong."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    gc.freeze()  # what was imported stays: to look for garbage in it again and again costs a twentieth of the time
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = (job(item), None)
        except Exception as error:
            answer = (None, explain(error))
        try:
            connection.send(answer)
        except OSError:  # nobody is there to hear it
            return


def how_it_ended(code: int | None) -> str:
    """Returns in words what the exit code of a process says; None: it has none yet."""
    if code is None or code >= 0:
        return f"ended with code {code}"
    if -code == signal.SIGKILL:
        return "was ended by SIGKILL (out of memory?); use fewer workers"
    names = {number.value: number.name for number in signal.Signals}
    return f"was ended by {names.get(-code, f'signal {-code}')}"


def explain(error: Exception) -> str:
    """Returns the message of an error that is meant for the user, and of any other where it came from."""
    if isinstance(error, ValueError):
        return str(error)
    where = "".join(traceback.format_exception(error, limit=-2))
    return f"{type(error).__name__}: {error}\n{where}"


def failure(key: Any, what: str) -> ValueError:
    """Returns the error for an item that failed."""
    return ValueError(f"{key} failed: {what}")
