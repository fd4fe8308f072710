"""Saving while training goes on: a copy in host memory, a thread that writes it, publication once all ranks have.

The thread only writes files. Whatever ranks must agree on is done by their main threads: `poll` between steps asks
whether everybody has finished, and publishes.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from eagle_train import dist
from eagle_train.train.checkpoint import CheckpointDir
from eagle_train.train.engine import Engine
from eagle_train.train.host_memory import HostCopy, room_for
from eagle_train.train.pieces import Piece, check_complete, write_pieces
from eagle_train.train.tensor_file import Written, write_bytes

log = logging.getLogger(__name__)

FAILURES = (OSError, RuntimeError)
"""What a save may fail with and training go on: full or read-only disks; no memory for the copy."""


@dataclass(kw_only=True)
class SaveReport:
    """How saving a step went, on this rank.

    Args:
        step: global step.
        background: whether training goes on while it is written.
        size: bytes that this rank writes.
        stall_seconds: for how long training stood still.
        write_seconds: how long this rank's files took to write; 0 until they are written.
        published: whether the checkpoint is there; False until then.
        trouble: why it could not be saved.
        before: report of an earlier save that was still being written and had to be finished first.
    """

    step: int
    background: bool = False
    size: int = 0
    stall_seconds: float = 0.0
    write_seconds: float = 0.0
    published: bool = False
    trouble: str | None = None
    before: SaveReport | None = None

    @property
    def seconds(self) -> float:
        """Returns how long it took from the call to the end of writing: what a save before the end of a job needs."""
        return self.stall_seconds + (self.write_seconds if self.background else 0.0)

    def metrics(self) -> dict[str, float]:
        """Returns the numbers of a settled save under the names of the metrics."""
        return {
            "time/checkpoint_stall_seconds": self.stall_seconds,
            "time/checkpoint_write_seconds": self.write_seconds,
            "checkpoint/gib_per_rank": self.size / 2**30,
            "checkpoint/published": float(self.published),
        }


class Write(threading.Thread):
    """Writes this rank's files of a checkpoint.

    Args:
        aside: folder to write into.
        pieces, files: what is written.

    Attributes:
        written: what was, by file name.
        trouble: why it could not be, or None.
        error: what was raised that is no failure of disk or memory.
    """

    def __init__(self, aside: Path, pieces: list[Piece], files: Mapping[str, bytes]) -> None:
        # A daemon: after an error elsewhere, the process does not wait for a checkpoint that nobody will publish.
        super().__init__(name="checkpoint", daemon=True)
        self.aside = aside
        self.pieces = pieces
        self.files = files
        self.written: dict[str, Written] = {}
        self.trouble: str | None = None
        self.error: Exception | None = None
        self.seconds = 0.0

    def run(self) -> None:
        """Writes everything; what goes wrong is kept for the main thread."""
        started = time.perf_counter()
        try:
            self.written = write_pieces(self.aside, self.pieces)
            self.written |= {name: write_bytes(self.aside / name, data) for name, data in self.files.items()}
        except FAILURES as error:
            self.trouble = str(error)
        except Exception as error:  # a defect: raised in the main thread
            self.trouble, self.error = repr(error), error
        self.seconds = time.perf_counter() - started


class Saver:
    """Saves the state of a run; all ranks call its methods together.

    Args:
        checkpoints: where to.
        background: write while training goes on; null: where all hosts have memory for a copy.
        max_failures: saves in a row that may fail; one more ends the run.

    Attributes:
        last: report of the last save that was begun, also before it is settled.
    """

    def __init__(self, checkpoints: CheckpointDir, *, background: bool | None = None, max_failures: int = 3) -> None:
        self.checkpoints = checkpoints
        self.background = background
        self.max_failures = max_failures
        self.failures = 0
        self.last: SaveReport | None = None
        self._copy = HostCopy()
        self._room = True
        self._write: Write | None = None

    def writing(self) -> bool:
        """Returns whether a save is being written in the background."""
        return self._write is not None

    def save(self, engine: Engine, step: int, files: Mapping[str, bytes], *, wait: bool = True) -> SaveReport:
        """Saves an engine's state as the checkpoint of a global step; an earlier save is finished first.

        Args:
            files: small files of this rank.
            wait: return when it is published, or could not be; otherwise possibly before, see `poll`.

        Raises:
            OSError: if it could not be saved, nor could the `max_failures` before it. Otherwise a failure is warned
                about and reported, and the checkpoints before it stay.
            RuntimeError: if the ranks do not hold the whole state, which is a defect.
        """
        started = time.perf_counter()
        if (before := self.finish()) is not None:
            before.before = None  # no chain of all saves
        report = self.last = SaveReport(step=step, before=before)
        pieces = list(engine.pieces())
        check_complete(pieces, engine.model)
        aside, trouble = dist.broadcast_object(self._begin(step) if dist.rank() == 0 else None)
        if trouble is not None:
            self._settled(report, trouble)
            return report
        report.size = sum(piece.values.nbytes for piece in pieces)
        report.background = not wait and self._in_background(pieces)
        self._write = Write(aside, pieces, files)
        if report.background:
            self._begin_writing(self._write)
        else:
            self._write.run()
            self.finish()
        report.stall_seconds = time.perf_counter() - started
        return report

    def poll(self, standstill: Callable[[], AbstractContextManager] = nullcontext) -> SaveReport | None:
        """Publishes the save that is being written if all ranks have written it, and returns its report.

        For between steps. It costs nothing while nothing is being written, and a small collective otherwise. While it
        is published, and what is no longer kept deleted, training stands still.

        Args:
            standstill: gives a context for that time.

        Raises:
            OSError: as `save`.
        """
        if self._write is None:
            return None
        ended = dist.all_reduce_sum([float(not self._write.is_alive())])[0]
        if ended != dist.world_size():
            return None
        started = time.perf_counter()
        with standstill():
            report = self.finish()
        report.stall_seconds += time.perf_counter() - started
        return report

    def finish(self) -> SaveReport | None:
        """Waits for the save that is being written, publishes it and returns its report; None if there is none.

        Raises:
            OSError: as `save`.
        """
        if self._write is None:
            return None
        write, self._write = self._write, None
        if write.is_alive():
            write.join()
        if write.error is not None:
            raise write.error
        report = self.last
        report.write_seconds = write.seconds
        ranks = dist.gather_objects((write.written, write.trouble))
        troubles = [f"rank {rank}: {trouble}" for rank, (_, trouble) in enumerate(ranks) if trouble]
        files = {name: file for written, _ in ranks for name, file in written.items()}
        trouble = self._publish(write.aside, report.step, files, troubles) if dist.rank() == 0 else None
        self._settled(report, dist.broadcast_object(trouble))
        return report

    def _begin(self, step: int) -> tuple[Path | None, str | None]:
        try:
            return self.checkpoints.begin(step), None
        except OSError as error:
            return None, str(error)

    def _in_background(self, pieces: list[Piece]) -> bool:
        if self.background is not None:
            return self.background
        needed = self._copy.missing(pieces)
        before, self._room = self._room, room_for(needed)
        if self._room != before and dist.rank() == 0:
            room, then = ("room", "goes on") if self._room else ("no room", "stands still")
            what = "%s in host memory for a copy of the state, %.1f GiB more on rank 0: training %s while it is saved"
            log.warning(what, room, needed / 2**30, then)
        return self._room

    def _begin_writing(self, write: Write) -> None:
        """Copies what is to be written, and writes the copy in the background."""
        try:
            write.pieces = self._copy.fill(write.pieces)
        except FAILURES as error:
            write.trouble = f"no copy in host memory: {error}"
        else:
            write.start()

    def _publish(self, aside: Path, step: int, files: Mapping[str, Written], troubles: list[str]) -> str | None:
        """Publishes what all ranks wrote, or removes it; returns why it could not be published."""
        if not troubles:
            try:
                self.checkpoints.publish(aside, step, files)
            except OSError as error:
                troubles = [f"rank 0: {error}"]
        if troubles:
            shutil.rmtree(aside, ignore_errors=True)  # it may be what fills the disk
            return "; ".join(troubles)
        try:
            self.checkpoints.prune()
        except OSError as error:
            log.warning("cannot delete checkpoints that are no longer kept: %s", error)
        return None

    def _settled(self, report: SaveReport, trouble: str | None) -> None:
        report.trouble, report.published = trouble, trouble is None
        self.failures = 0 if trouble is None else self.failures + 1
        if trouble is None:
            return
        what = f"the checkpoint of step {report.step} could not be saved ({trouble}); those before it are as they were"
        if self.failures > self.max_failures:
            raise OSError(
                f"{what}. That was failure {self.failures} in a row, max_failed_saves={self.max_failures} allows no "
                f"more: make room or give write permission at {self.checkpoints.folder}, and run the same command"
            )
        log.error("%s. Training goes on; failure %d in a row of %d", what, self.failures, self.max_failures)
