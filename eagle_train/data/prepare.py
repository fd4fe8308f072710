"""A published data set becomes the shards of a recipe's sources.

    <data_root>/.prepare/<recipe>/records/<source>/000012.jsonl   the records of one shard to come
                                  archives/                       where the members of each archive are
                                  shards/<source>/                shards and indexes of unfinished sources
                                  reports/<source>/000012.json    what became of a piece

A source's folder appears under `data_root` when it is whole. A run that was stopped goes on with the pieces that have
no report, and with those that lacked images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from eagle_train.data.archives import find_archives, index_archive
from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.jobs import open_pool
from eagle_train.data.media_store import MediaPlaces, MediaStore
from eagle_train.data.pieces import Piece, PieceReport, read_report, run, write_json
from eagle_train.data.recipe import DatasetCard, Published, Recipe
from eagle_train.data.shards import write_manifest
from eagle_train.data.split import Part, ensure_split, image_of, read_piece, read_pieces
from eagle_train.types import SampleError

PROBES = 100
"""Records of a source whose images are looked for before it is built."""
REPORT = "prepared.json"

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Shows a loop: takes a description and the number of items, gives what to call with the number just done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one source. If it is there now, `read == written + len(errors)`."""

    name: str
    found: int | None = None
    """Records in the annotation; None if it was not read."""
    images: tuple[int, int] | None = None
    """How many images were found of how many looked for before building; None if none was looked for."""
    read: int = 0
    written: int = 0
    errors: tuple[SampleError, ...] = ()
    """Why records are not written; if there are too many, those found until then."""
    problem: str | None = None
    """Why it is not there; None if it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What all sources of one run share.

    Args:
        work: folder of what is unfinished.
        data_root: folder of what is done.
        places: where the images are.
        pool: processes that build; None: build here.
        max_bad_share, progress: as in `prepare`.
    """

    work: Path
    data_root: Path
    places: MediaPlaces
    pool: Executor | None
    max_bad_share: float
    progress: Progress


def prepare(
    recipe: Recipe,
    folder: Path,
    data_root: Path,
    *,
    progress: Progress,
    workers: int = 1,
    samples_per_shard: int = 1000,
    max_bad_share: float = 0.01,
) -> tuple[list[Outcome], list[str]]:
    """Builds the sources of a recipe that are not there, as far as the download has them.

    Args:
        folder: the download, see `Published`.
        workers: processes; the shards do not depend on it.
        samples_per_shard: records of a shard, bad ones included.
        max_bad_share: largest share of a source's records that may be left out, 0 to 1.

    Returns:
        What became of each source that was not there, and what is wrong with the archives.

    Raises:
        ValueError: for a recipe without a download, or an annotation with records of no source.
    """
    published = recipe.published
    if published is None:
        raise ValueError(f"recipe {recipe.name} names no download; `data build recipe={recipe.name}` may make it")
    if not 0 <= max_bad_share <= 1 or workers < 1 or samples_per_shard < 1:
        raise ValueError(
            f"max_bad_share={max_bad_share} is a share, from 0 to 1; workers={workers} and "
            f"samples_per_shard={samples_per_shard} are at least 1"
        )
    cards = [card for name in recipe.sources if not (card := recipe.cards[name]).is_there(data_root)]
    annotation = folder / published.annotation
    if not cards:
        return [], []
    if not annotation.is_file():
        lacks = f"{annotation} is not there"
        return [Outcome(name=card.name, problem=lacks) for card in cards], []
    work = data_root / ".prepare" / recipe.name
    select = {name: recipe.cards[name].select for name in recipe.sources}
    expected = sum(recipe.cards[name].num_samples or 0 for name in select)
    with progress(f"reading {annotation.name}", expected or None) as step:
        parts = ensure_split(annotation, select, work, records_per_piece=samples_per_shard, progress=step)
    places, defects = locate_media(published, folder, work / "archives", progress)
    with open_pool(workers) as pool:
        job = Job(
            work=work, data_root=data_root, places=places, pool=pool, max_bad_share=max_bad_share, progress=progress
        )
        outcomes = [prepare_source(card, parts[card.name], job) for card in cards]
    if all(outcome.problem is None for outcome in outcomes):
        shutil.rmtree(work)
    return outcomes, defects


def locate_media(published: Published, folder: Path, tables: Path, progress: Progress) -> tuple[MediaPlaces, list[str]]:
    """Returns where the images of a download are, its archives indexed, and what is wrong with them."""
    archives, defects = tuple(find_archives(folder, published.archives)), []
    for archive in archives:
        with progress(f"listing {archive.name}", None) as step:
            _, defect = index_archive(archive, tables, step)
        if defect:
            defects.append(f"{archive.name}: {defect}")
    return MediaPlaces(folder, tuple(published.media_roots), archives, tables), defects


def prepare_source(card: DatasetCard, part: Part, job: Job) -> Outcome:
    """Builds one source, or says why it cannot be built."""
    records = read_pieces(job.work / "records" / card.name)
    images = probe(records, job.places)
    if images is not None and images[0] == 0:
        where = ", ".join(f"{name}/ ({count} records)" for name, count in list(part.folders.items())[:5])
        problem = f"none of its images is in {job.places.folder}; they are named in {where}"
        return Outcome(name=card.name, found=part.num_records, images=images, problem=problem)
    out = card.folder(job.data_root)
    shards, reports = job.work / "shards" / card.name / out.name, job.work / "reports" / card.name
    shards.mkdir(parents=True, exist_ok=True)
    reports.mkdir(parents=True, exist_ok=True)
    pieces = [
        Piece(path, shards / f"{out.name}-{path.stem}.tar", reports / f"{path.stem}.json", job.places)
        for path in records
    ]
    try:
        done = build_pieces(pieces, card.name, part.num_records, job)
    except TooManyBadSamples as error:
        return Outcome(name=card.name, found=part.num_records, images=images, errors=error.errors, problem=str(error))
    outcome = Outcome(
        name=card.name,
        found=part.num_records,
        images=images,
        read=sum(report.read for report in done),
        written=sum(report.written for report in done),
        errors=tuple(error for report in done for error in report.errors),
    )
    publish(shards, out, done, outcome)
    return outcome


def probe(records: Sequence[Path], places: MediaPlaces) -> tuple[int, int] | None:
    """Returns how many images are there of how many looked for, one of each piece; None if no record has one."""
    paths = []
    for piece in records[:: max(1, len(records) // PROBES)]:
        for _, line in read_piece(piece):
            try:
                path = image_of(json.loads(line))
            except ValueError:
                continue  # a broken line: counted when it is built
            if path:
                paths.append(path)
                break
    store = MediaStore(places)
    found = sum(store.holds(path) for path in paths)
    store.close()
    return (found, len(paths)) if paths else None


def build_pieces(pieces: Sequence[Piece], source: str, total: int, job: Job) -> list[PieceReport]:
    """Builds the pieces of a source that are not done; returns the reports of all, in order.

    Raises:
        TooManyBadSamples: as soon as more than `max_bad_share` of `total` records are bad, or if all are.
    """
    known = {piece.shard: report for piece in pieces if (report := read_report(piece)) is not None}
    rest = [piece for piece in pieces if piece.shard not in known]
    with job.progress(f"writing {source}", total) as step:
        step(sum(report.read for report in known.values()))
        check_bad(known.values(), source, total, job.max_bad_share)
        for report in run(rest, job.pool):
            known[report.shard] = report
            step(report.read)
            check_bad(known.values(), source, total, job.max_bad_share)
    return [known[piece.shard] for piece in pieces]


def check_bad(reports: Iterable[PieceReport], source: str, total: int, max_bad_share: float) -> None:
    """Raises TooManyBadSamples if the pieces so far have too many bad records of a source's `total`."""
    bad = sum(len(report.errors) for report in reports)
    if bad > max_bad_share * total or 0 < bad == total:
        errors = sorted((error for report in reports for error in report.errors), key=lambda error: error.key)
        raise TooManyBadSamples(source, errors, total, max_bad_share)


def publish(shards: Path, out: Path, reports: Sequence[PieceReport], outcome: Outcome) -> None:
    """Moves the finished shards of a source, with their manifest and a report, to where training looks for them."""
    write_manifest(shards, {report.shard.name: report.written for report in reports if report.written})
    errors = [[error.key, error.reason, error.detail] for error in outcome.errors]
    write_json(shards / REPORT, {"read": outcome.read, "written": outcome.written, "errors": errors})
    for unfinished in shards.glob("*.partial"):  # of a run that was killed
        unfinished.unlink()
    out.parent.mkdir(parents=True, exist_ok=True)
    shards.replace(out)
