"""Reading the ledger: the ranks' files merged, superseded attempts told apart, and the accounts of a stage."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from eagle_train.data.ledger import HEADER, MAGIC, RECORD, USED, VERSION, LedgerShard, errors_path, shards_path
from eagle_train.types import REASONS, SampleError

SUMS = {"tokens": "num_tokens", "targets": "num_targets", "tiles": "num_tiles", "frames": "num_frames"}
"""Of the accounts, with the column that they sum."""
TABLE = np.dtype([*((name, RECORD[name]) for name in RECORD.names), ("rank", "<u4"), ("attempt", "<u4")])
NEVER = 1 << 63
"""Larger than any step."""


@dataclass(frozen=True, kw_only=True)
class LedgerFile:
    """What one rank wrote in one attempt."""

    path: Path
    rank: int
    attempt: int
    records: np.ndarray
    """(n,) RECORD, memory-mapped; shard numbers are places in `shards`."""
    shards: Sequence[LedgerShard]
    end: int = NEVER
    """Records from this step on are superseded: a later attempt ran it again."""

    def chosen(self, num_steps: int | None = None, *, superseded: bool = False) -> np.ndarray:
        """Returns (m,) RECORD: those that count, of steps before `num_steps`; with the superseded ones if asked."""
        end = NEVER if superseded else self.end
        end = end if num_steps is None else min(end, num_steps)
        return self.records if end == NEVER else self.records[self.records["step"] < end]


@dataclass(frozen=True, kw_only=True)
class LedgerTable:
    """The records of a stage, of all ranks, in the order of step and row; samples of a row as they were planned."""

    records: np.ndarray
    """(n,) TABLE; shard numbers are places in `shards`."""
    superseded: np.ndarray
    """(n,) bool; all False unless they were asked for."""
    shards: Sequence[LedgerShard]

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, kw_only=True, slots=True)
class BadUse:
    """A planned sample that turned out bad."""

    step: int
    row: int
    rank: int
    attempt: int
    source: str
    error: SampleError
    superseded: bool


def read_ledger(folder: Path, stage: str, *, superseded: bool = False) -> LedgerTable:
    """Returns the records of a stage that count; with `superseded`, those too that a later attempt replaced.

    Raises:
        ValueError: for a damaged file; a last record torn by a kill is no damage.
    """
    return merge(open_files(folder, stage), superseded=superseded)


def merge(files: Sequence[LedgerFile], *, superseded: bool = False) -> LedgerTable:
    """Returns the records of several files as one table."""
    # A shard that moved between attempts stays the same shard; the newest location counts.
    places: dict[tuple[str, int], int] = {}
    shards: dict[int, LedgerShard] = {}
    parts = [file.chosen(superseded=superseded) for file in files]
    records = np.empty(sum(map(len, parts)), TABLE)
    lost = np.zeros(len(records), bool)
    start = 0
    for file, part in zip(files, parts, strict=True):
        numbers = [places.setdefault((shard.prefix, shard.num_samples), len(places)) for shard in file.shards]
        shards |= zip(numbers, file.shards, strict=True)
        here = records[start : start + len(part)]
        for name in RECORD.names:
            here[name] = part[name]
        if numbers != list(range(len(numbers))):
            here["shard"] = np.array(numbers, np.uint32)[part["shard"]]
        here["rank"], here["attempt"] = file.rank, file.attempt
        lost[start : start + len(part)] = part["step"] >= file.end
        start += len(part)
    # Stable: a row's samples stay as planned, as they are in one file, and earlier attempts stay before later ones.
    order = np.lexsort((records["row"], records["step"]))
    return LedgerTable(
        records=records.take(order),  # ten times as fast as records[order]
        superseded=lost[order],
        shards=[shards[number] for number in range(len(shards))],
    )


def open_files(folder: Path, stage: str) -> list[LedgerFile]:
    """Returns the ledger files of a stage, by attempt and rank; none if it wrote none.

    Raises:
        ValueError: for a damaged file.
    """
    lists: dict[str, list[LedgerShard]] = {}
    files = [open_file(path, lists) for path in sorted((folder / stage).glob("rank-*.bin"))]
    files = sorted((file for file in files if file is not None), key=lambda file: (file.attempt, file.rank))
    firsts: dict[int, int] = {}
    for file in files:
        if len(file.records):
            first = int(file.records["step"].min())
            firsts[file.attempt] = min(first, firsts.get(file.attempt, NEVER))
    # attempts that began at steps 0, 4, 2 end before steps 2, 2, never
    attempts = sorted(firsts, reverse=True)
    later = accumulate((firsts[attempt] for attempt in attempts), min, initial=NEVER)
    ends = dict(zip(attempts, later, strict=False))
    return [
        LedgerFile(
            path=file.path,
            rank=file.rank,
            attempt=file.attempt,
            records=file.records,
            shards=file.shards,
            end=ends.get(file.attempt, NEVER),
        )
        for file in files
    ]


def open_file(path: Path, lists: dict[str, list[LedgerShard]]) -> LedgerFile | None:
    """Returns one file; None if a kill left not even its header.

    Args:
        lists: of shards, by their fingerprint; read once.
    """
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.strip(b"\0"):
        return None
    magic, version, size, rank, attempt, name = HEADER.unpack(header)
    if (magic, version, size) != (MAGIC, VERSION, RECORD.itemsize):
        raise ValueError(f"{path} is no ledger of version {VERSION} ({magic!r}, version {version}, {size} bytes each)")
    count = (path.stat().st_size - HEADER.size) // RECORD.itemsize  # the rest is a torn record
    records = np.memmap(path, RECORD, "r", HEADER.size, (count,)) if count else np.empty(0, RECORD)
    while count and not records[count - 1].tobytes().strip(b"\0"):  # a power cut leaves zeros behind
        count -= 1
    records = records[:count]
    name = name.decode()
    if name not in lists:
        lists[name] = read_shards(shards_path(path.parent.parent, path.parent.name, name))
    if count and int(records["status"].max()) > len(REASONS):
        raise ValueError(f"{path} holds status {records['status'].max()}, known are 0 to {len(REASONS)}; update")
    if count and int(records["shard"].max()) >= len(lists[name]):
        raise ValueError(f"{path} holds shard {records['shard'].max()}, its list has {len(lists[name])}; it is damaged")
    return LedgerFile(path=path, rank=rank, attempt=attempt, records=records, shards=lists[name])


def read_shards(path: Path) -> list[LedgerShard]:
    """Returns the shards that a ledger's numbers mean.

    Raises:
        ValueError: if the list is not there or damaged.
    """
    try:
        return [LedgerShard(**shard) for shard in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} names the shards of the ledger and cannot be read: {error}") from error


def read_bad(folder: Path, stage: str) -> list[BadUse]:
    """Returns the bad samples of a stage, superseded ones marked, in the order of step and row."""
    found = [bad for file in open_files(folder, stage) for bad in read_errors(file)]
    return sorted(found, key=lambda bad: (bad.step, bad.row, bad.attempt))


def read_errors(file: LedgerFile) -> Iterator[BadUse]:
    """Yields the bad samples of one file; a line torn by a kill is skipped."""
    path = errors_path(file.path)
    for text in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # its record was not written either
        yield BadUse(
            step=line["step"],
            row=line["row"],
            rank=file.rank,
            attempt=file.attempt,
            source=line["source"],
            error=SampleError(line["key"], line["reason"], line["detail"]),
            superseded=line["step"] >= file.end,
        )


def account(
    folder: Path,
    stage: str,
    num_steps: int,
    read: Mapping[str, int],
    total: Mapping[str, int],
    dropped: Mapping[str, Mapping[str, int]],
) -> dict[str, dict]:
    """Returns, by source: samples `read`, `used`, `dropped` by reason, `pending` ones not read yet; and `SUMS`.

    In good books read = used + sum of dropped; the two sides are counted apart.

    Args:
        folder: of the ledger.
        stage: whose records count.
        num_steps: steps done; later records are of a lost future and do not count.
        read: samples in the rows of these steps, by source, from the plan.
        total: samples in all rows of the stage, by source.
        dropped: samples dropped from the plan, by source and reason; they count as read, once.
    """
    outcomes = {source: np.zeros(256, np.int64) for source in total}
    sums = {source: Counter(dict.fromkeys(SUMS, 0)) for source in total}
    for file in open_files(folder, stage):  # one at a time: a long run's ledger need not fit in memory
        records = file.chosen(num_steps)
        names = sorted({shard.source for shard in file.shards})
        places = {name: place for place, name in enumerate(names)}
        sources = np.array([places[shard.source] for shard in file.shards], np.int64)[records["shard"]]
        counts = np.bincount(sources * 256 + records["status"], minlength=256 * len(names)).reshape(-1, 256)
        columns = {name: np.bincount(sources, records[of], len(names)) for name, of in SUMS.items()}
        for name, place in places.items():
            if counts[place].any():
                outcomes[name] += counts[place]
                sums[name].update({column: int(values[place]) for column, values in columns.items()})
    accounts = {}
    for source in total:
        bad = Counter(dropped[source])
        bad.update({reason: n for reason, n in zip(REASONS, outcomes[source][1:].tolist(), strict=False) if n})
        accounts[source] = {
            "read": read[source] + sum(dropped[source].values()),
            "used": int(outcomes[source][USED]),
            "dropped": dict(bad),
            "pending": total[source] - read[source],
            **sums[source],
        }
    return accounts
