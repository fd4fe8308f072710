"""Data sets built piece by piece, in parallel; each appears in its place when all of it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.pieces import Piece, PieceReport, Records, build_piece, describe, read_report, write_json
from eagle_train.data.shards import write_manifest
from eagle_train.data.work_folder import REPORTS, SHARDS
from eagle_train.data.work_pool import run_all
from eagle_train.types import SampleError

REPORT = "prepared.json"
"""Beside the shards: how many records were read and written, and what is wrong with the others."""

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Shows a loop: takes a description and the number of items, gives what to call with the number just done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePlan:
    """A data set to be built.

    Args:
        name: told in errors.
        out: folder that its shards will be in.
        records: of each shard.
        num_records: of all shards, bad ones included.
    """

    name: str
    out: Path
    records: Sequence[Records]
    num_records: int


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What became of a data set; `read == written + len(errors)`."""

    read: int
    """Records found."""
    written: int
    """Samples in the shards."""
    errors: tuple[SampleError, ...]
    """Why the others are not, in the order of the records."""
    shards: tuple[Path, ...]


def build_sources(
    sources: Sequence[SourcePlan], work: Path, *, workers: int, max_bad_share: float, progress: Progress
) -> dict[str, BuildReport | TooManyBadSamples]:
    """Builds data sets and moves each to its place; returns by name what became of it, or why it is refused.

    What was built by a run that was stopped is kept. A data set is given up as soon as too many of its records are bad.

    Args:
        work: folder of what is not whole yet, see `work_folder.at_work`.
        workers: processes; no byte depends on it.
        max_bad_share: largest share of the records of each that may be left out, 0 to 1.

    Raises:
        ValueError: names a piece that cannot be built.
    """
    if not sources:
        return {}
    unfinished = {source.name: _Unfinished(source, work, max_bad_share) for source in sources}
    title = sources[0].name if len(sources) == 1 else f"{len(sources)} sources"
    with progress(f"writing {title}", sum(source.num_records for source in sources)) as step:
        for each in unfinished.values():
            step(sum(report.read for report in each.reports.values()))
            each.check()
        rest = [(each, piece) for each in unfinished.values() for piece in each.missing()]
        owner = {piece.shard: each for each, piece in rest}
        wanted = (piece for each, piece in rest if each.outcome is None)  # it may be refused meanwhile
        for piece, report in run_all(build_piece, wanted, workers, len(rest)):
            step(report.read)
            owner[piece.shard].add(piece, report)
    return {name: each.outcome for name, each in unfinished.items()}


class _Unfinished:
    """A data set of which some pieces are there."""

    def __init__(self, source: SourcePlan, work: Path, max_bad_share: float) -> None:
        self._source, self._max_bad_share = source, max_bad_share
        self._shards = work / SHARDS / source.name / source.out.name
        reports = work / REPORTS / source.name
        self._shards.mkdir(parents=True, exist_ok=True)
        reports.mkdir(parents=True, exist_ok=True)
        self._pieces = [
            Piece(records, self._shards / f"{source.out.name}-{number:06d}.tar", reports / f"{number:06d}.json")
            for number, records in enumerate(source.records)
        ]
        found = {piece.shard: read_report(piece) for piece in self._pieces}
        self.reports: dict[Path, PieceReport] = {shard: report for shard, report in found.items() if report}
        self._num_bad = sum(len(report.errors) for report in self.reports.values())
        self.outcome: BuildReport | TooManyBadSamples | None = None

    def missing(self) -> Iterator[Piece]:
        """Yields the pieces that are to be built, none of a data set that is refused."""
        if self.outcome is None:
            yield from (piece for piece in self._pieces if piece.shard not in self.reports)

    def add(self, piece: Piece, report: PieceReport) -> None:
        """Adds what was built."""
        self.reports[piece.shard] = report
        self._num_bad += len(report.errors)
        if self.outcome is None:
            self.check()

    def check(self) -> None:
        """Refuses the data set if too much is bad; publishes it if all pieces are there."""
        total, share = self._source.num_records, self._max_bad_share
        if self._num_bad > share * total or 0 < self._num_bad == total:
            self.outcome = TooManyBadSamples(self._source.name, self._errors(), total, share)
        elif len(self.reports) == len(self._pieces):
            self.outcome = self._publish()

    def _errors(self) -> tuple[SampleError, ...]:
        """Returns what is wrong, in the order of the records."""
        reports = (self.reports.get(piece.shard) for piece in self._pieces)
        return tuple(error for report in reports if report for error in report.errors)

    def _publish(self) -> BuildReport:
        """Moves the shards with a manifest and a report to where training looks for them."""
        reports, errors = [self.reports[piece.shard] for piece in self._pieces], self._errors()
        counts = {name: number for report in reports for name, number in report.shards.items()}
        read, out = sum(report.read for report in reports), self._source.out
        write_manifest(self._shards, counts)
        write_json(self._shards / REPORT, {"read": read, "written": read - len(errors), "errors": describe(errors)})
        for partial in self._shards.glob("*.partial"):  # of a run that was killed
            partial.unlink()
        out.parent.mkdir(parents=True, exist_ok=True)
        self._shards.replace(out)
        return BuildReport(read, read - len(errors), errors, tuple(out / name for name in counts))
