"""The ledger: what became of every planned sample of every step. Append-only, one file per rank and attempt.

    ledger/<stage>/rank-00000.attempt-000.bin            a header, then a `RECORD` per sample
    ledger/<stage>/rank-00000.attempt-000.errors.jsonl   the bad ones again, with key and detail
    ledger/<stage>/shards-<fingerprint>.json             the shards that the records' numbers mean

After a resume, steps are run again under a higher attempt; on reading, they supersede the earlier attempts' records
from the first of them on, those of a future that was lost with a kill included. `ledger_read.py` reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from eagle_train.data.locations import as_location, stem
from eagle_train.types import REASONS, PackedBatch, SampleUse

VERSION = 1
HEADER = struct.Struct("<8sIIII8s")
"""Magic, version, bytes of a record, rank, attempt, fingerprint of the shards."""
MAGIC = b"EAGLELDG"
USED = 0
"""Status of a sample that was used; that of a bad one is 1 + its reason's place in `REASONS`."""
RECORD = np.dtype(
    {
        "names": ["step", "status", "row", "shard", "index", "num_tokens", "num_targets", "num_tiles", "num_frames"],
        "formats": ["<u4", "u1", "<i8", "<u4", "<u4", "<u4", "<u4", "<u4", "<u4"],
        "offsets": [0, 4, 8, 16, 20, 24, 28, 32, 36],  # three bytes after the status are spare
        "itemsize": 40,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerShard:
    """What a shard number of the ledger means.

    Args:
        source: name of its source.
        location: path or address of the tar.
        num_samples: rows of its index.
        index_dir: where its index is; None: beside it.
    """

    source: str
    location: str
    num_samples: int
    index_dir: str | None = None

    @property
    def prefix(self) -> str:
        """What the keys of its samples begin with: `<source>/<shard stem>/`."""
        return f"{self.source}/{stem(as_location(self.location))}/"


class LedgerError(OSError, ValueError):
    """The ledger cannot be written, so the run must stop.

    An `OSError` where ranks gather what failed to be written, a `ValueError` as a message to the user.
    """


class Ledger:
    """What one rank writes in one attempt.

    Args:
        folder: of the run's ledger.
        stage: its name.
        rank: of this process.
        attempt: number of this start of the run, counted from 0.
        shards: of the stage's catalog, in its order.

    Raises:
        LedgerError: if the folder cannot be written.
        ValueError: if the attempt was recorded before.
    """

    def __init__(self, folder: Path, stage: str, rank: int, attempt: int, shards: Sequence[LedgerShard]) -> None:
        self.shards = shards
        content = shards_json(shards)
        name = fingerprint(content)
        self._records = records_path(folder, stage, rank, attempt)
        self._pending: list[tuple[int, int, SampleUse]] = []
        self._files: dict[Path, FileIO] = {}
        try:
            self._records.parent.mkdir(parents=True, exist_ok=True)
            publish(shards_path(folder, stage, name), content)
            self._write(self._records, HEADER.pack(MAGIC, VERSION, RECORD.itemsize, rank, attempt, name.encode()))
        except FileExistsError as error:
            raise ValueError(
                f"{self._records} is there already: attempt {attempt} of this run was recorded before; restore "
                f"attempts.jsonl, which counts them, or start anew with another run_dir"
            ) from error
        except OSError as error:
            raise self._unwritten(error) from error

    def record(self, step: int, batch: PackedBatch) -> None:
        """Takes what one row used and dropped; an empty row adds nothing. `flush` writes it.

        A row that ranks share is recorded by the first of them.
        """
        if batch.part is not None and batch.part.index > 0:
            return
        planned = len(batch.keys) + len(batch.errors)
        assert len(batch.uses) == planned, f"row {batch.row} has {planned} samples and {len(batch.uses)} uses"
        self._pending += [(step, batch.row, use) for use in batch.uses]

    def flush(self) -> None:
        """Hands the records to the operating system; called before a step is trained on.

        Raises:
            LedgerError: if they cannot be written. The step must not be trained on: nothing would tell of it.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        rows = [(step, status_of(use), row, *numbers(use)) for step, row, use in pending]
        lines = "".join(self._error_line(step, row, use) for step, row, use in pending if use.error is not None)
        try:
            if lines:  # first, so that a record of a bad sample always has its detail
                self._write(errors_path(self._records), lines.encode())
            self._write(self._records, np.array(rows, RECORD).tobytes())
        except OSError as error:
            raise self._unwritten(error) from error

    def sync(self) -> None:
        """Forces what is written onto the disk; called before a checkpoint that counts these steps is published.

        Raises:
            LedgerError: as `flush`.
        """
        self.flush()
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Writes what is pending and closes the files."""
        try:
            self.flush()
        finally:
            while self._files:
                self._files.popitem()[1].close()

    def _error_line(self, step: int, row: int, use: SampleUse) -> str:
        line = {
            "step": step,
            "row": row,
            "source": self.shards[use.shard].source,
            "key": use.error.key,
            "reason": use.error.reason,
            "detail": use.error.detail,
        }
        return json.dumps(line) + "\n"  # ASCII: a key may hold what is no valid Unicode

    def _write(self, path: Path, data: bytes) -> None:
        if path not in self._files:
            self._files[path] = path.open("xb", buffering=0)
        left = memoryview(data)
        while left:  # a disk that fills up takes a part first, and refuses the next
            left = left[self._files[path].write(left) :]

    def _unwritten(self, error: OSError) -> LedgerError:
        return LedgerError(
            f"the ledger cannot be written at {self._records} ({error}); the run stops, because no step may go "
            f"unrecorded. Make room or repair the file system, then run the same command to go on"
        )


def numbers(use: SampleUse) -> tuple[int, ...]:
    """Returns the numbers of a sample in the order of `RECORD`."""
    return use.shard, use.index, use.num_tokens, use.num_targets, use.num_tiles, use.num_frames


def status_of(use: SampleUse) -> int:
    """Returns the status of a sample in a record."""
    return USED if use.error is None else 1 + REASONS.index(use.error.reason)


def records_path(folder: Path, stage: str, rank: int, attempt: int) -> Path:
    """Returns the path of a rank's records of an attempt."""
    return folder / stage / f"rank-{rank:05d}.attempt-{attempt:03d}.bin"


def errors_path(records: Path) -> Path:
    """Returns the path of the details beside a file of records."""
    return records.with_suffix(".errors.jsonl")


def shards_path(folder: Path, stage: str, name: str) -> Path:
    """Returns the path of a list of shards."""
    return folder / stage / f"shards-{name}.json"


def shards_json(shards: Sequence[LedgerShard]) -> str:
    """Returns a list of shards as JSON, a line each."""
    return "[\n" + ",\n".join(json.dumps(asdict(shard)) for shard in shards) + "\n]\n"


def fingerprint(content: str) -> str:
    """Returns a hash of 8 hexadecimal digits."""
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def publish(path: Path, content: str) -> None:
    """Writes a file of that name and content unless it is there; ranks may do it at once."""
    if path.exists():
        return
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    aside.write_text(content)
    aside.replace(path)
