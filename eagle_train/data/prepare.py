"""A published data set becomes the shards of a recipe's sources.

A source's folder appears under `data_root` when it is whole. A run that was stopped goes on with the pieces that have
no report, and with those of whose images some were missing or unreadable; `work_folder` says where they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from eagle_train.data.archives import find_archives, index_archive
from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.build_sources import BuildReport, Progress, SourcePlan, build_sources
from eagle_train.data.media_store import MediaPlaces, MediaStore
from eagle_train.data.pieces import AnnotationRecords
from eagle_train.data.recipe import DatasetCard, Published, Recipe
from eagle_train.data.split import (
    RECORDS,
    Part,
    Selector,
    ensure_split,
    image_of,
    read_piece,
    read_pieces,
    split_annotation,
)
from eagle_train.data.work_folder import at_work, content_hash, work_folder
from eagle_train.types import SampleError

PROBES = 100
"""Records of a source whose images are looked for before it is built."""


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
        raise ValueError(
            f"recipe {recipe.name} names no download; `data show recipe={recipe.name}` says where "
            "each source comes from"
        )
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
    work = work_folder(data_root, recipe.name)
    select = {name: recipe.cards[name].select for name in recipe.sources}
    split = partial(split_by_card, recipe, annotation, work, samples_per_shard, progress)
    with at_work(work, [content_hash(annotation), select, samples_per_shard]):
        cards = [card for card in cards if not card.is_there(data_root)]  # others may have built them meanwhile
        parts = ensure_split(work, split)
        places, defects = locate_media(published, folder, work / "archives", progress)
        outcomes = {card.name: look_for_media(card, parts[card.name], work, places) for card in cards}
        found = [card for card in cards if outcomes[card.name].problem is None]
        plans = [plan_source(card, parts[card.name], data_root, work, places) for card in found]
        built = build_sources(plans, work, workers=workers, max_bad_share=max_bad_share, progress=progress)
        outcomes |= {name: add_result(outcomes[name], result) for name, result in built.items()}
        if all(outcome.problem is None for outcome in outcomes.values()):
            shutil.rmtree(work)
    return list(outcomes.values()), defects


def split_by_card(
    recipe: Recipe, annotation: Path, work: Path, records_per_piece: int, progress: Progress
) -> dict[str, Part]:
    """Writes the records of each source into a work folder; returns what each has."""
    expected = sum(recipe.cards[name].num_samples or 0 for name in recipe.sources)
    with progress(f"reading {annotation.name}", expected or None) as step:
        return split_annotation(
            annotation,
            Selector({name: recipe.cards[name].select for name in recipe.sources}),
            work / RECORDS,
            sources=list(recipe.sources),
            records_per_piece=records_per_piece,
            progress=step,
        )


def locate_media(published: Published, folder: Path, tables: Path, progress: Progress) -> tuple[MediaPlaces, list[str]]:
    """Returns where the images of a download are, its archives indexed, and what is wrong with them."""
    archives, defects = tuple(find_archives(folder, published.archives)), []
    for archive in archives:
        with progress(f"listing {archive.name}", None) as step:
            _, defect = index_archive(archive, tables, step)
        if defect:
            defects.append(f"{archive.name}: {defect}")
    return MediaPlaces(folder, tuple(published.media_roots), archives, tables), defects


def look_for_media(card: DatasetCard, part: Part, work: Path, places: MediaPlaces) -> Outcome:
    """Returns what is known of a source before it is built; its problem is that none of its images is there."""
    images = probe(read_pieces(work / RECORDS / card.name), places)
    problem = None
    if images is not None and images[0] == 0:
        where = ", ".join(f"{name}/ ({count} records)" for name, count in list(part.folders.items())[:5])
        problem = f"none of its images is in {places.folder}; they are named in {where}"
    return Outcome(name=card.name, found=part.num_records, images=images, problem=problem)


def plan_source(card: DatasetCard, part: Part, data_root: Path, work: Path, places: MediaPlaces) -> SourcePlan:
    """Returns what is to be built of a source."""
    records = [AnnotationRecords(path, places) for path in read_pieces(work / RECORDS / card.name)]
    return SourcePlan(name=card.name, out=card.folder(data_root), records=records, num_records=part.num_records)


def add_result(outcome: Outcome, result: BuildReport | TooManyBadSamples) -> Outcome:
    """Returns the outcome of a source that was built or refused."""
    if isinstance(result, TooManyBadSamples):
        return replace(outcome, errors=result.errors, problem=str(result))
    return replace(outcome, read=result.read, written=result.written, errors=result.errors)


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
