"""Items made by a thread while the one before is in use."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass
from queue import Empty, Queue
from typing import TypeVar

T = TypeVar("T")

HELD = 2
"""Items that exist at once besides the one being made: the one in use, and the one that waits."""
PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class End:
    """Nothing comes after it."""

    error: BaseException | None = None
    """What ended the items, raised where the next one is asked for."""


def ahead(items: Generator[T]) -> Generator[T]:
    """Yields `items` in their order; the next one is made by a thread while the last one is in use.

    Closing it closes `items`, as soon as the one that is being made is done.
    """
    waiting: Queue[T | End] = Queue(maxsize=1)
    closing = threading.Event()

    def make() -> None:
        end = End()
        try:
            for item in items:
                waiting.put(item)
                if closing.is_set():
                    break
        except BaseException as error:  # it belongs to who asks for the item
            end = End(error)
        finally:
            items.close()
        waiting.put(end)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := waiting.get(), End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closing.set()
        while thread.is_alive():  # it may wait for room
            empty(waiting)
            thread.join(PAUSE_SECONDS)


def empty(queue: Queue) -> None:
    """Takes out what is in a queue."""
    try:
        while True:
            queue.get_nowait()
    except Empty:
        return
