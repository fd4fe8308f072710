"""Where every second of a run went, over all its starts, killed ones too: `goodput.jsonl` in the run folder.

Rank 0 appends to it. `{"start": time}` begins a start of the run. Each line after it tells the seconds of each phase
since the line before, and the global step reached; they come every few seconds and at every checkpoint.
`{"resumed": step}` says that all steps after `step` are done again. So a killed run loses at most its last few seconds,
which then count as time that it was down, and all phases of all starts add up to the time from the first start to the
last line. Of two processes that run it at once, as after a requeue from a node that is not quite gone, the later one
writes.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import psutil

from eagle_train.track.jsonl import end_torn_line
from eagle_train.track.timeline import PHASES, Timeline, goodput_of, read_timeline

log = logging.getLogger(__name__)

FILE = "goodput.jsonl"


class Goodput:
    """Tells the phases of this start of a run apart; a phase inside another interrupts it.

    A phase costs a lock and two readings of the clock. A device is never waited for: the work of a GPU counts in the
    phase in which the host comes to wait for it.

    Args:
        path: file to append to; None: nothing is written, as on all ranks but the first.
        started: when this start began, in seconds since 1970; None: now.
        every_seconds: between lines; a thread writes them, also in the middle of a long step.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        started: float | None = None,
        every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        now, wall = clock(), time.time()
        self._timeline = read_timeline(path) if path is not None and path.exists() else Timeline()
        started = max(wall if started is None else min(started, wall), self._timeline.end)
        self._clock = clock
        self._since = now - max(wall - started, 0.0)
        """When the present phase began, by the clock."""
        self._phases = ["startup"]
        self._pending: Counter[str] = Counter()
        """Seconds that no line tells yet."""
        self._step = self._timeline.step
        self._lock = threading.RLock()
        self._unwritten = b""
        self._size: int | None = None
        """Of the file after our last line; None before the first."""
        self._failing = False
        self._file = None if path is None else open_whole(path)
        self._append({"start": started})
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(every_seconds,), daemon=True, name="goodput")
        if path is not None:
            self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside as phase `name`, one of `PHASES`."""
        assert name in PHASES, f"{name!r} is no phase of a run"
        with self._lock:
            self._count()
            self._phases.append(name)
        try:
            yield
        finally:
            with self._lock:
                self._count()
                self._phases.pop()

    def reach(self, step: int) -> None:
        """Takes down that global step `step` is done."""
        with self._lock:
            self._step = step

    def saved(self) -> None:
        """Takes down that what is saved now holds all steps so far, and nothing later."""
        with self._lock:
            self._write(saved=True)

    def resumed(self, step: int) -> None:
        """Says that the run goes on after global step `step`: what was done beyond it is lost, and done again."""
        with self._lock:
            self._write()
            self._step = step
            self._append({"resumed": step})

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of the whole run so far by phase, over all starts."""
        with self._lock:
            self._count()
            found = self._timeline.totals()
            return found | {name: found[name] + value for name, value in self._pending.items()}

    def metrics(self) -> dict[str, float]:
        """Returns the shares of training and of checkpoint stalls in all seconds of the run so far, 0 to 1."""
        seconds = self.seconds()
        stall = seconds["checkpoint"] / max(sum(seconds.values()), 1e-9)
        return {"perf/goodput": goodput_of(seconds), "perf/checkpoint_stall_share": stall}

    def close(self) -> None:
        """Writes the last line."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._write()
            if self._file is not None:
                self._file.close()

    def _count(self) -> None:
        """Adds the time since the last change to the present phase."""
        now = self._clock()
        self._pending[self._phases[-1]] += max(now - self._since, 0.0)
        self._since = max(now, self._since)

    def _write(self, **more: bool) -> None:
        self._count()
        seconds = {name: value for name, value in self._pending.items() if value > 0}
        self._pending.clear()
        self._append({"step": self._step, "seconds": seconds} | more)

    def _append(self, record: dict[str, Any]) -> None:
        self._timeline.add(record)
        if self._file is None or self._file.closed:
            return
        self._unwritten += json.dumps(record).encode() + b"\n"
        try:
            if self._size is not None and os.fstat(self._file.fileno()).st_size > self._size:
                log.warning("another start of this run writes %s: this one leaves it to that", self._file.name)
                self._file.close()
                return
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._size, self._failing = os.fstat(self._file.fileno()).st_size, False
        except OSError as error:  # a full disk: the run's own files say more; what is kept here is written later
            if not self._failing:
                log.warning("cannot write %s: %s", self._file.name, error)
            self._failing = True

    def _beat(self, every_seconds: float) -> None:
        while not self._stopped.wait(every_seconds):
            with self._lock:
                self._write()


def open_whole(path: Path) -> FileIO:
    """Returns a file to append whole lines to, unbuffered."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end_torn_line(path)
    return path.open("ab", buffering=0)


def process_started() -> float:
    """Returns when this process began, in seconds since 1970: before anything was imported."""
    return min(psutil.Process().create_time(), time.time())
