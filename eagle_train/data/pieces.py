"""Pieces: the records of one shard each, built by processes that know nothing of each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path

from eagle_train.data.build import Good, from_record
from eagle_train.data.index import ensure_index
from eagle_train.data.media_store import MediaPlaces, MediaStore
from eagle_train.data.shards import write_shard
from eagle_train.data.split import read_piece
from eagle_train.types import SampleError


@dataclass(frozen=True, slots=True)
class Piece:
    """The work of one process: the records of one shard."""

    records: Path
    shard: Path
    report: Path
    places: MediaPlaces


@dataclass(frozen=True, slots=True)
class PieceReport:
    """What became of a piece."""

    shard: Path
    read: int
    errors: tuple[SampleError, ...]

    @property
    def written(self) -> int:
        """Samples in the shard."""
        return self.read - len(self.errors)


def run(pieces: Sequence[Piece], pool: Executor | None) -> Iterator[PieceReport]:
    """Yields the reports of pieces as they are done; what is not begun is left if the caller stops."""
    if pool is None:
        yield from map(build_piece, pieces)
        return
    futures = [pool.submit(build_piece, piece) for piece in pieces]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def build_piece(piece: Piece) -> PieceReport:
    """Writes the shard of a piece, its index and its report."""
    store = MediaStore(piece.places)
    records = read_piece(piece.records)
    errors: list[SampleError] = []

    def good() -> Iterator[Good]:
        for key, data in records:
            sample = from_record(key, data, store.read)
            if isinstance(sample, SampleError):
                errors.append(sample)
            else:
                yield sample

    write_shard(good(), piece.shard)
    store.close()
    if len(errors) < len(records):
        ensure_index(piece.shard)
    else:
        piece.shard.unlink()
    report = PieceReport(piece.shard, len(records), tuple(errors))
    write_json(piece.report, {"read": report.read, "errors": [[e.key, e.reason, e.detail] for e in errors]})
    return report


def read_report(piece: Piece) -> PieceReport | None:
    """Returns the report of a piece that is done; one that lacked media is not, they may be there now."""
    if not piece.report.is_file():
        return None
    known = json.loads(piece.report.read_text())
    report = PieceReport(piece.shard, known["read"], tuple(SampleError(*error) for error in known["errors"]))
    lacked = any(error.reason == "missing_media" for error in report.errors)
    return report if not lacked and (report.written == 0 or piece.shard.is_file()) else None


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file that appears when it is whole."""
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(json.dumps(content))
    aside.replace(path)
