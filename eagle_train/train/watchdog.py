"""Ends a run that is stuck, and says who is to blame, long before the time-out of a collective.

Every rank has a thread that reads the rank's heart and writes what it finds into the run's folder. The thread whose
rank makes no progress for too long raises the alarm by a file; then every rank's thread writes the stacks of its
process, the one who raised the alarm names the ranks that are behind, their phase, step and samples, asks SLURM to
run the job again, and all of them end with `STALLED`.

Covered: a main thread that sleeps, reads, computes, or waits in a collective, in Python or in C code that lets other
threads run. C code that holds Python's lock stops the thread too: such a rank does not answer the alarm and is named
for it, and a timer of the interpreter's own writes its stacks and ends it with code 1; so does that timer where the
run's folder can no longer be written to. A process that the kernel itself holds (a dead disk) cannot be ended by
anybody; SLURM drains such nodes. Collectives wait longer than all of this, see `Limits.collective_seconds`.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from eagle_train import dist, slurm
from eagle_train.train.exit_codes import STALLED
from eagle_train.train.heartbeat import Beat, Heart
from eagle_train.train.stalls import Sighting, is_old, waits_for_others, who_is_behind

log = logging.getLogger(__name__)

MAX_KEYS = 50
"""Sample keys that a heartbeat names."""
RECORD_BYTES = 8192
"""A heartbeat is written over the one before, padded, so that it costs no change of the file's name or size."""
ALARM, REPORT = "alarm", "report.txt"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a rank may do one thing, seconds.

    Args:
        start_seconds: building, indexing, resuming; and anything in the first step of a stage, which compiles.
        step_seconds: waiting for data, one row, one collective, one update.
        save_seconds: a checkpoint.
        evaluate_seconds: the evaluation at the end.
        answer_seconds: that ranks have to answer an alarm.
    """

    start_seconds: float = 7200.0
    step_seconds: float = 900.0
    save_seconds: float = 3600.0
    evaluate_seconds: float = 86400.0
    answer_seconds: float = 30.0

    def of(self, phase: str, *, first: bool) -> float:
        """Returns the limit of a phase."""
        named = {"start": self.start_seconds, "save": self.save_seconds, "evaluate": self.evaluate_seconds}
        return named.get(phase, self.start_seconds if first else self.step_seconds)

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return min(30.0, self.step_seconds / 30)

    @property
    def patience(self) -> float:
        """Seconds beyond a limit in which ranks notice, answer and name the culprit."""
        return 6 * self.interval + 2 * self.answer_seconds

    @property
    def collective_seconds(self) -> float:
        """For how long a collective may wait: whichever rank it waits for, its watchdog comes first."""
        longest = max(self.start_seconds, self.step_seconds, self.save_seconds, self.evaluate_seconds)
        return longest + 2 * self.patience


class Watchdog:
    """The thread of one rank.

    Args:
        folder: of this start of the run, shared by all ranks; see `new_folder`.
        heart: of this rank.
        limits: see there.
    """

    def __init__(self, folder: Path, heart: Heart, limits: Limits) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.heart = heart
        self.limits = limits
        self.rank, self.world_size = dist.rank(), dist.world_size()
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        self._record = os.open(self._path("json"), os.O_WRONLY | os.O_CREAT, 0o644)
        self._stacks = self._path("stacks").open("w")
        self._arm(heart.now)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; what it wrote, and folders that are empty then, are deleted, unless there was an alarm."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        os.close(self._record)
        self._stacks.close()
        if not (self.folder / ALARM).exists():
            for kind in ("json", "stacks"):
                self._path(kind).unlink(missing_ok=True)
            for folder in (self.folder, self.folder.parent, self.folder.parent.parent):  # the last is the run's
                remove_if_empty(folder)

    def _path(self, kind: str) -> Path:
        return self.folder / f"rank-{self.rank:05d}.{kind}"

    def _watch(self) -> None:
        while not self._closed.wait(self.limits.interval):
            try:
                self._look()
            except Exception as error:  # storage that fails for a while, say, must not end the watch
                log.warning("watchdog of rank %d: %r", self.rank, error)

    def _look(self) -> None:
        now = self.heart.now
        limit = self._arm(now)
        self._write(answers=False)
        raised = time.monotonic() - now.since > limit and raise_alarm(self.folder, self.rank)
        if raised or (self.folder / ALARM).exists():
            self._end(raised)

    def _arm(self, now: Beat) -> float:
        """Sets the timer that ends a process in which this thread can do nothing; returns the limit of what it does.

        That is so where it does not come to its turn, and where the storage takes no alarm. The timer runs without
        Python's lock. It is late enough for the other ranks to name this one before it ends, since its end would end
        them too.
        """
        limit = self.limits.of(now.phase, first=now.first)
        left = limit + self.limits.patience - (time.monotonic() - now.since)
        if left > 0:
            faulthandler.dump_traceback_later(left, exit=True, file=self._stacks)
        return limit

    def _write(self, *, answers: bool) -> None:
        """Writes what this rank is doing."""
        now = self.heart.now
        stack = sys._current_frames().get(self._main)
        sighting = Sighting(
            rank=self.rank,
            host=socket.gethostname(),
            node=slurm.node_name(),
            pid=os.getpid(),
            phase=now.phase,
            step=now.step,
            number=now.number,
            seconds=round(time.monotonic() - now.since, 1),
            time=time.time(),
            keys=self._keys() if answers else [],
            where=f"{stack.f_code.co_filename}:{stack.f_lineno} {stack.f_code.co_name}"[:500] if stack else "",
            waits=waits_for_others(stack),
            answers=answers,
        )
        os.pwrite(self._record, as_record(sighting), 0)

    def _keys(self) -> list[str]:
        try:
            return list(self.heart.keys())[:MAX_KEYS]
        except Exception as error:  # the loader's state is read while its thread may be in the middle of it
            return [f"(not known: {error!r})"]

    def _end(self, raised: bool) -> None:
        """Answers an alarm, and ends the process."""
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._write(answers=True)
        deadline = time.monotonic() + self.limits.answer_seconds + 2 * self.limits.interval
        if raised:
            self._report(deadline)
        else:  # one who leaves before the report is written would pass for one who did not answer
            while not (self.folder / REPORT).exists() and time.monotonic() < deadline + self.limits.interval:
                time.sleep(self.limits.interval / 10)
        sys.stderr.flush()
        os._exit(STALLED)

    def _report(self, deadline: float) -> None:
        """Names who is behind, once all ranks have answered or the time is over, and asks for a new start."""
        while True:
            seen = read_sightings(self.folder)
            if sum(sighting.answers for sighting in seen) == self.world_size or time.monotonic() > deadline:
                break
            time.sleep(self.limits.interval / 10)
        text = f"{who_is_behind(seen, self.world_size)}\nStacks of all ranks: {self.folder}"
        step = max(sighting.step for sighting in seen)
        aside = self.folder / f"{REPORT}.{self.rank}"
        aside.write_text(f"{text}\nstep {step}\n")
        log.error("%s", text)
        # The same step again and again is no accident: a new start would end like this one.
        slurm.requeue(hold=is_old(self.folder.parent, REPORT, step))
        aside.replace(self.folder / REPORT)


def new_folder(run_dir: Path) -> Path:
    """Returns a new folder for a start of the run, the same on all ranks; those of starts without an alarm go."""
    name = ""
    if dist.rank() == 0:
        old = sorted((run_dir / "watchdog").glob("start-*"))
        name = f"start-{int(old[-1].name.split('-')[1]) + 1 if old else 0:04d}"
        (run_dir / "watchdog" / name).mkdir(parents=True)
        for folder in old:
            if not (folder / ALARM).exists():
                shutil.rmtree(folder, ignore_errors=True)
    return run_dir / "watchdog" / dist.broadcast_object(name)


def as_record(sighting: Sighting) -> bytes:
    """Returns a sighting as a line of `RECORD_BYTES`, with as many of its keys as there is room for."""
    text = json.dumps(sighting.as_dict()).encode()
    if len(text) < RECORD_BYTES:
        return text.ljust(RECORD_BYTES - 1) + b"\n"
    return as_record(replace(sighting, keys=sighting.keys[: len(sighting.keys) // 2]))


def raise_alarm(folder: Path, rank: int) -> bool:
    """Raises the alarm; returns whether it was this rank who did."""
    try:
        with (folder / ALARM).open("x") as file:
            file.write(f"{rank}\n")
    except FileExistsError:
        return False
    return True


def read_sightings(folder: Path) -> list[Sighting]:
    """Returns the newest heartbeat of every rank that wrote one; one that is being written is left out."""
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            found.append(Sighting(**json.loads(path.read_text())))
        except ValueError:
            continue
    return found


def remove_if_empty(folder: Path) -> None:
    """Removes a folder unless something is in it."""
    try:
        folder.rmdir()
    except OSError:
        return
