"""Processes that do one thing to many items; they end with the process that started them, however it ends."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol


class Pool(Protocol):
    """Does the work on items, each named by the file that comes of it."""

    size: int
    """Items at once."""

    @property
    def busy(self) -> int:
        """Items begun whose end `wait` has not told yet."""

    def begin(self, path: Path, item: Any) -> None:
        """Begins an item; only if fewer than `size` are busy."""

    def wait(self, seconds: float) -> list[Path]:
        """Returns the items that are done since the last call; waits up to `seconds` for one if any is busy.

        Raises:
            ValueError: names an item that failed.
        """


@contextmanager
def open_pool(make: Callable[[Any], object], size: int) -> Iterator[Pool]:
    """Gives a pool of `size` processes; of one: this process, so that nothing is sent or started."""
    if size <= 1:
        yield Here(make)
        return
    pool = Processes(make, size)
    try:
        yield pool
    finally:
        pool.close()


class Here:
    """Does the work in this process."""

    size = 1

    def __init__(self, make: Callable[[Any], object]) -> None:
        self._make = make
        self._done: list[Path] = []

    @property
    def busy(self) -> int:
        """0 or 1."""
        return len(self._done)

    def begin(self, path: Path, item: Any) -> None:
        """Does an item."""
        try:
            self._make(item)
        except Exception as error:
            raise failure(path, str(error)) from error
        self._done.append(path)

    def wait(self, seconds: float) -> list[Path]:
        """Returns the item that was begun."""
        del seconds
        done, self._done = self._done, []
        return done


class Processes:
    """Does the work in processes started afresh (a fork would copy threads of others).

    Each has a pipe of its own. When this process dies its end of the pipe closes, and the other process ends; when the
    other one dies, this one notices in the same way.
    """

    def __init__(self, make: Callable[[Any], object], size: int) -> None:
        self.size = size
        context = get_context("spawn")
        self._processes: dict[Connection, BaseProcess] = {}
        self._items: dict[Connection, Path] = {}
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    @property
    def busy(self) -> int:
        """Items under way."""
        return len(self._items)

    def begin(self, path: Path, item: Any) -> None:
        """Gives an item to a process that has none."""
        free = next(connection for connection in self._processes if connection not in self._items)
        self._items[free] = path
        try:
            free.send(item)
        except OSError as error:
            raise self._lost(free) from error

    def wait(self, seconds: float) -> list[Path]:
        """Returns the items that are done, see `Pool`."""
        done = []
        for connection in wait(list(self._items), seconds):
            try:
                error = connection.recv()
            except (EOFError, OSError) as lost:
                raise self._lost(connection) from lost
            path = self._items.pop(connection)
            if error is not None:
                raise failure(path, error)
            done.append(path)
        return done

    def _lost(self, connection: Connection) -> ValueError:
        process = self._processes[connection]
        process.join(1)
        what = f"the process at work on it ended with code {process.exitcode} (-9: out of memory?); use fewer workers"
        return failure(self._items[connection], what)

    def close(self) -> None:
        """Ends the processes; one that is at work is stopped."""
        for connection, process in self._processes.items():
            connection.close()
            if connection in self._items:
                process.terminate()
        for process in self._processes.values():
            process.join()


def serve(make: Callable[[Any], object], connection: Connection) -> None:
    """Works on what comes through the pipe until it closes; answers each item with None or what went wrong."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            make(item)
            answer = None
        except Exception as error:
            where = traceback.format_exc(limit=-2)
            answer = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}\n{where}"
        try:
            connection.send(answer)
        except OSError:  # nobody is there to hear it
            return


def failure(path: Path, what: str) -> ValueError:
    """Returns the error for an item that could not be made."""
    return ValueError(f"cannot make {path}: {what}")
