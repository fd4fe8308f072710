"""Existing data sets become canonical shards: annotation files with a folder of media, or WebDataset tars.

Media are copied byte for byte. What cannot be used is left out, counted and named; too much of it fails the build. A
build that was stopped goes on where it was, to the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.build_sources import BuildReport, Progress, SourcePlan, build_sources
from eagle_train.data.media_store import MediaFolder
from eagle_train.data.pieces import AnnotationRecords, Records
from eagle_train.data.split import RECORDS, Part, Selector, ensure_split, read_pieces, split_annotation
from eagle_train.data.tar_records import TarRecords, split_tars
from eagle_train.data.work_folder import TARS, at_work, content_hash, file_version, work_folder


def build_from_annotation(
    out: Path,
    *,
    annotation: Path,
    media_root: Path | None = None,
    samples_per_shard: int = 1000,
    max_bad_share: float = 0.01,
    workers: int = 1,
    progress: Progress,
) -> BuildReport:
    """Writes the records of a JSON list or JSON Lines file, with their media, as shards.

    A sample's key is its position in the file, from 0, bad ones counted: `00000012`. The shards appear all at
    once when they are whole.

    Args:
        out: folder of the shards; empty or absent.
        annotation: records in any shape that `schemas.parse_record` takes.
        media_root: folder that media paths start from; the annotation's by default. Paths that lead out of it
            are refused (links inside it are followed).
        samples_per_shard: records of a shard, bad ones included; large media make more shards of it.
        max_bad_share: largest share of records that may be left out, 0 to 1.
        workers: processes; no byte depends on it.

    Raises:
        TooManyBadSamples: if more are bad, or all are; what was built is kept for the next attempt.
        ValueError: if `out` holds something, or the annotation is no file or has no records.
    """
    if not annotation.is_file():
        raise ValueError(f"no file annotation={annotation}")
    root = annotation.parent if media_root is None else media_root

    def split(work: Path) -> dict[str, Part]:
        with progress(f"reading {annotation.name}", None) as step:
            return split_annotation(
                annotation, Selector({out.name: None}), work / RECORDS, sources=[out.name],
                records_per_piece=samples_per_shard, progress=step,
            )  # fmt: skip

    return _build(
        out.absolute(),
        split,
        lambda path: AnnotationRecords(path, MediaFolder(root)),
        inputs=[content_hash(annotation), str(root.absolute()), samples_per_shard],
        origin=annotation.name,
        max_bad_share=max_bad_share,
        workers=workers,
        progress=progress,
    )


def build_from_tars(
    out: Path,
    *,
    tars: Sequence[Path],
    media_root: Path | None = None,
    samples_per_shard: int = 1000,
    max_bad_share: float = 0.01,
    workers: int = 1,
    progress: Progress,
) -> BuildReport:
    """Writes the samples of WebDataset tars as canonical shards.

    Keys are counted through all tars, from 0: `00000012`; `meta["origin"]` and the errors name the tar and the
    key in it. Media that the record does not name are left behind.

    Args:
        out: as in `build_from_annotation`, like the other arguments.
        tars: read in this order; their samples are what `schemas.parse_members` takes.
        media_root: folder of the files that their records name beside their members, and may not lead out of; None:
            they may name none.

    Raises:
        TooManyBadSamples: if more than `max_bad_share` are bad, or all are.
        ValueError: if `out` holds something, or a tar is not whole or has no samples.
    """
    tars = [tar.absolute() for tar in tars]

    def split(work: Path) -> dict[str, Part]:
        with progress("reading headers of tars", len(tars)) as step:
            return split_tars(
                tars, work / TARS, work / RECORDS, name=out.name, records_per_piece=samples_per_shard, workers=workers,
                progress=step,
            )  # fmt: skip

    return _build(
        out.absolute(),
        split,
        lambda path: TarRecords(path, media_root),
        inputs=[
            [(str(tar), file_version(tar)) for tar in tars],
            samples_per_shard,
            *([] if media_root is None else [str(media_root.absolute())]),
        ],
        origin=", ".join(tar.name for tar in tars),
        max_bad_share=max_bad_share,
        workers=workers,
        progress=progress,
    )


def _build(
    out: Path,
    split: Callable[[Path], Mapping[str, Part]],
    read: Callable[[Path], Records],
    *,
    inputs: Any,
    origin: str,
    max_bad_share: float,
    workers: int,
    progress: Progress,
) -> BuildReport:
    """Builds one data set.

    Args:
        split: writes the records into a work folder.
        read: gives the samples in a file of records.
        inputs: tells what `split` reads.
        origin: named in errors.
    """
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share is {max_bad_share}; it is a share, from 0 to 1")
    work = work_folder(out.parent, out.name)
    with at_work(work, inputs):
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty; delete it or choose another folder")
        part = ensure_split(work, partial(split, work))[out.name]
        if part.num_records == 0:
            shutil.rmtree(work)
            raise ValueError(f"{origin} holds no records; is it the right file?")
        plan = SourcePlan(
            name=out.name,
            out=out,
            records=[read(path) for path in read_pieces(work / RECORDS / out.name)],
            num_records=part.num_records,
        )
        built = build_sources([plan], work, workers=workers, max_bad_share=max_bad_share, progress=progress)
        (result,) = built.values()
        if isinstance(result, TooManyBadSamples):
            raise result
        shutil.rmtree(work)
    return result
