"""Trying again: disks of clusters and object stores fail now and then, and mostly work a moment later."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from eagle_train.data.locations import Location, redacted, shown

T = TypeVar("T")
MAX_PAUSE_SECONDS = 30.0


class StorageError(OSError):
    """A location that could not be read in any attempt, though it may well be there.

    It is about the network or the disk, not about a sample: counting it as a bad sample would lose good data.
    """


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often to try, and how long to wait in between.

    Args:
        attempts: at least 1, the first one included.
        backoff_seconds: pause after the first failure; it doubles each time, up to 30 seconds, and varies by half
            so that the ranks of a job do not all come back at once.
    """

    attempts: int = 6
    backoff_seconds: float = 0.5

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff_seconds < 0:
            values = f"attempts={self.attempts}, backoff_seconds={self.backoff_seconds}"
            raise ValueError(f"data.storage: {values}; attempts is at least 1, backoff_seconds at least 0")

    def run(self, action: Callable[[], T], is_passing: Callable[[Exception], bool], location: Location) -> T:
        """Returns `action()`.

        Args:
            is_passing: whether an error may go away by itself; any other is raised at once.
            location: for the message.

        Raises:
            StorageError: if every attempt failed; its cause is the last error.
        """
        start = time.monotonic()
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except Exception as error:
                if not is_passing(error):
                    raise
                last = error
            if attempt < self.attempts:
                pause = min(MAX_PAUSE_SECONDS, self.backoff_seconds * 2 ** (attempt - 1))
                # The system's randomness: the generators that a resumed run restores are not touched.
                time.sleep(pause * random.SystemRandom().uniform(0.5, 1.5))
        seconds = time.monotonic() - start
        raise StorageError(
            f"{shown(location)}: {self.attempts} attempts in {seconds:.1f} s failed, the last with "
            f"{type(last).__name__}: {redacted(str(last), location)}; check the network, the service and its "
            "limits, or raise data.storage.attempts or data.storage.timeout_seconds, and start again"
        ) from last
