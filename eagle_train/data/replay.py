"""A step made again: the rows that the ledger has on record, read, decoded and packed once more, and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from eagle_train.data.ledger import USED, LedgerShard, numbers, status_of
from eagle_train.data.ledger_read import LedgerFile
from eagle_train.data.loader import RowDataset, RowTask
from eagle_train.types import REASONS, PackedBatch

QUARANTINED = 1 + REASONS.index("quarantined")
COUNTS = ("num_tokens", "num_targets", "num_tiles", "num_frames")


@dataclass(frozen=True, kw_only=True)
class RecordedRow:
    """A row as the ledger knows it."""

    row: int
    """Its number in the stage."""
    rank: int
    """That ran it."""
    attempt: int
    records: np.ndarray
    """(K,) ledger.RECORD, as planned."""
    shards: Sequence[LedgerShard]
    """That the records' numbers mean."""


@dataclass(frozen=True, kw_only=True)
class RebuiltRow:
    """A row made again."""

    recorded: RecordedRow
    batch: PackedBatch
    differences: tuple[str, ...]
    """What of it is not as recorded, a sample each."""


def last_step(files: Sequence[LedgerFile]) -> int:
    """Returns the last step that a stage has on record, -1 if none."""
    return max((int(part["step"].max()) for part in (file.chosen() for file in files) if len(part)), default=-1)


def recorded_rows(files: Sequence[LedgerFile], step: int) -> list[RecordedRow]:
    """Returns the rows of a step, rank by rank, those of a rank in the order in which it ran them."""
    rows = []
    for file in sorted(files, key=lambda file: file.rank):
        records = file.chosen(step + 1)
        records = np.array(records[records["step"] == step])
        borders = np.flatnonzero(np.diff(records["row"])) + 1
        for part in np.split(records, borders) if len(records) else ():
            rows.append(
                RecordedRow(
                    row=int(part["row"][0]), rank=file.rank, attempt=file.attempt, records=part, shards=file.shards
                )
            )
    return rows


def rebuild(rows: Sequence[RecordedRow], dataset: RowDataset, shards: Sequence[LedgerShard]) -> Iterator[RebuiltRow]:
    """Yields the rows made again.

    Args:
        shards: those of the dataset's catalog, in its order.

    Raises:
        ValueError: if a shard of a row is not among them, or was changed.
    """
    places = {(s.source, s.prefix): n for n, s in enumerate(shards)}
    places |= {(s.source, s.location): n for n, s in enumerate(shards)}
    for row in rows:
        found = {n: find_shard(row.shards[n], shards, places) for n in set(row.records["shard"].tolist())}
        yield rebuild_row(row, dataset, found)


def find_shard(wanted: LedgerShard, shards: Sequence[LedgerShard], places: Mapping[tuple[str, str], int]) -> int:
    """Returns the place of a recorded shard among those of now; one that moved keeps its name.

    Raises:
        ValueError: if it is not there, or has not as many samples.
    """
    place = places.get((wanted.source, wanted.location), places.get((wanted.source, wanted.prefix)))
    if place is None:
        raise ValueError(f"{wanted.location} is not among the shards of source {wanted.source} now; restore it")
    if shards[place].num_samples != wanted.num_samples:
        now = shards[place].num_samples
        raise ValueError(f"{shards[place].location} has {now} samples, the run read {wanted.num_samples}; restore it")
    return place


def rebuild_row(row: RecordedRow, dataset: RowDataset, found: Mapping[int, int]) -> RebuiltRow:
    """Returns a row made again.

    Args:
        found: shard in the dataset's catalog by shard in the row's records.
    """
    catalog = dataset.catalog
    places = [(found[shard], index) for shard, index in row.records[["shard", "index"]].tolist()]
    usable = [not catalog.shards[shard].lost and catalog.sizes(shard).num_tokens[index] > 0 for shard, index in places]
    samples = [int(catalog.starts[shard]) + index for (shard, index), use in zip(places, usable, strict=True) if use]
    # The run read the row without those that it had put into quarantine itself.
    left_out = {place for place, status in zip(places, row.records["status"], strict=True) if status == QUARANTINED}
    dataset = replace(dataset, left_out=frozenset(left_out))
    batch = dataset[RowTask(row.row, np.array(samples, dtype=np.int64))]
    uses = iter(batch.uses)
    differences = []
    for record, (shard, index), there in zip(row.records, places, usable, strict=True):
        was = words(int(record["status"]), [int(record[name]) for name in COUNTS])
        use = next(uses) if there else None
        gone = "left out: its shard is not there" if catalog.shards[shard].lost else "left out by the plan"
        now = words(status_of(use), numbers(use)[2:]) if use else gone
        if now != was:
            detail = f" ({use.error.detail})" if use and use.error else ""
            differences.append(f"{catalog.key(shard, index)}: recorded {was}, rebuilt {now}{detail}")
    return RebuiltRow(recorded=row, batch=batch, differences=tuple(differences))


def words(status: int, counts: Sequence[int]) -> str:
    """Returns what became of a sample."""
    if status != USED:
        return f"dropped as {REASONS[status - 1]}"
    return "used with " + ", ".join(f"{n} {name.removeprefix('num_')}" for name, n in zip(COUNTS, counts, strict=True))


def digest(batch: PackedBatch) -> str:
    """Returns the SHA-256 of what the model is given: every tensor with its name, and the keys."""
    hashes = hashlib.sha256(repr(batch.keys).encode())
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            hashes.update(f"{field.name} {tuple(value.shape)} {value.dtype}".encode())
            hashes.update(value.cpu().contiguous().numpy().tobytes())
    return hashes.hexdigest()
