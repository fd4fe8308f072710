"""Pieces of a data set, a shard each: built by processes that know nothing of each other, and kept."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

from eagle_train.data.convert import from_record
from eagle_train.data.index import ensure_index
from eagle_train.data.media import OF_FILES
from eagle_train.data.media_store import Places
from eagle_train.data.shards import MAX_SHARD_BYTES, TarSample, write_tars
from eagle_train.data.split import read_piece
from eagle_train.types import SampleError


class Records(Protocol):
    """Where the samples of one piece come from; can be sent to processes, and gives the same whenever it is read."""

    def read(self) -> Iterator[TarSample | SampleError]:
        """Yields the samples, or what is wrong with them."""


@dataclass(frozen=True, slots=True)
class AnnotationRecords:
    """Records of an annotation, with their media.

    Args:
        path: file of `split_annotation`.
        places: where the media are.
    """

    path: Path
    places: Places

    def read(self) -> Iterator[TarSample | SampleError]:
        """Yields the samples, see `Records`."""
        media = self.places.open()
        for key, data in read_piece(self.path):
            yield from_record(key, data, media.read)
        media.close()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one process builds at a time.

    Args:
        records: what is written.
        shard: where to.
        report: file that appears when the shard and its index are there.
    """

    records: Records
    shard: Path
    report: Path

    def __str__(self) -> str:
        return str(self.shard)


@dataclass(frozen=True, slots=True)
class PieceReport:
    """What became of a piece."""

    read: int
    errors: tuple[SampleError, ...]
    shards: Mapping[str, int]
    """Samples by name of the shard: one, none if all samples are bad, several if it would be larger than a shard is."""


def build_piece(piece: Piece, max_bytes: int = MAX_SHARD_BYTES) -> PieceReport:
    """Writes the shard of a piece, its index and its report.

    What is too large for one shard goes on in `<shard>_001.tar`, `<shard>_002.tar` and so on.
    """
    folder, stem = piece.shard.parent, piece.shard.stem
    for old in (*folder.glob(f"{stem}.*"), *folder.glob(f"{stem}_*")):  # of an earlier run
        old.unlink(missing_ok=True)
    errors: list[SampleError] = []
    read = 0

    def good() -> Iterator[TarSample]:
        nonlocal read
        for sample in piece.records.read():
            read += 1
            if isinstance(sample, SampleError):
                errors.append(sample)
            else:
                yield sample

    paths = (folder / (f"{stem}_{number:03d}.tar" if number else f"{stem}.tar") for number in count())
    shards = write_tars(good(), paths, max_bytes=max_bytes)
    for shard in shards:
        ensure_index(shard)
    report = PieceReport(read, tuple(errors), {shard.name: number for shard, number in shards.items()})
    write_json(piece.report, {"read": read, "errors": describe(errors), "shards": report.shards})
    return report


def read_report(piece: Piece) -> PieceReport | None:
    """Returns the report of a piece that is done; with media missing or unreadable it is not: they may be repaired."""
    if not piece.report.is_file():
        return None
    known = json.loads(piece.report.read_text())
    report = PieceReport(known["read"], tuple(SampleError(*error) for error in known["errors"]), known["shards"])
    lacked = any(error.reason in OF_FILES for error in report.errors)
    there = all((piece.shard.parent / name).is_file() for name in report.shards)
    return report if there and not lacked else None


def describe(errors: list[SampleError] | tuple[SampleError, ...]) -> list[list[str]]:
    """Returns errors as plain values, which `SampleError` takes."""
    return [[error.key, error.reason, error.detail] for error in errors]


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file that appears when it is whole."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    aside.write_text(json.dumps(content))
    aside.replace(path)
