"""Existing data sets become canonical shards: annotation files with a folder of media, or WebDataset tars.

Media are copied byte for byte. What cannot be used is left out, counted and named; too much of it fails the build.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_train.data.annotations import read_annotation
from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.index import read_record
from eagle_train.data.placeholders import MediaRef
from eagle_train.data.schemas import Record, parse_record, stored_names, to_canonical
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.shards import MAX_MEMBER_BYTES, scan_shard, write_shards
from eagle_train.data.storage import open_shard
from eagle_train.types import SampleError

ADDRESS = re.compile(r"(data:|[A-Za-z][A-Za-z0-9+.-]*://)")

Good = tuple[str, dict[str, Any], dict[str, bytes]]
"""Key, canonical record and media of a sample, as `write_shards` takes them."""
ReadMedia = Callable[[MediaRef, str], bytes]
"""Takes a medium and the key of its sample."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What became of a data set; `read == written + len(errors)`."""

    read: int
    """Records found."""
    written: int
    """Samples in the shards."""
    errors: tuple[SampleError, ...]
    """Why the others are not."""
    shards: tuple[Path, ...]


def build_from_annotation(
    out: Path,
    *,
    annotation: Path,
    media_root: Path | None = None,
    samples_per_shard: int = 1000,
    max_bad_share: float = 0.01,
    progress: Callable[[int], None] | None = None,
) -> BuildReport:
    """Writes the records of a JSON list or JSON Lines file, with their media, as shards.

    A sample's key is its position in the file, from 0, bad ones counted: `00000012`. The shards appear all at
    once when they are whole; building the same again changes nothing.

    Args:
        out: folder of the shards; empty, absent, or the result of the same build.
        annotation: records in any shape that `schemas.parse_record` takes; JSON Lines are read line by line.
        media_root: folder that media paths start from; the annotation's by default. Paths that lead out of it
            are refused (links inside it are followed).
        max_bad_share: largest share of records that may be left out, 0 to 1.
        progress: called after every record with the number of records read so far.

    Raises:
        TooManyBadSamples: if more are bad, or all are; nothing is left in `out`.
        ValueError: if `out` holds something else, or the annotation has no records.
    """
    annotation = Path(annotation)
    root = annotation.parent if media_root is None else Path(media_root)

    def read(ref: MediaRef, key: str) -> bytes:
        return read_media_file(ref, root, key)

    samples = (from_record(f"{i:08d}", data, read) for i, data in enumerate(read_annotation(annotation)))
    return _build(Path(out), samples, annotation.name, samples_per_shard, max_bad_share, progress)


def build_from_tars(
    out: Path,
    *,
    tars: Sequence[Path],
    samples_per_shard: int = 1000,
    max_bad_share: float = 0.01,
    progress: Callable[[int], None] | None = None,
) -> BuildReport:
    """Writes the samples of WebDataset tars as canonical shards.

    Keys are counted through all tars, from 0: `00000012`; `meta["origin"]` and the errors name the tar and the
    key in it. Media that the record does not name are left behind.

    Args:
        out: as in `build_from_annotation`, like the other arguments.
        tars: read in this order; their samples are what `schemas.parse_members` takes.

    Raises:
        TooManyBadSamples: if more than `max_bad_share` are bad, or all are.
        ValueError: if `out` holds something else, or a tar is not whole or has no samples.
    """
    paths = [Path(tar) for tar in tars]
    names = ", ".join(path.name for path in paths)
    return _build(Path(out), _from_tars(paths), names, samples_per_shard, max_bad_share, progress)


def _build(
    out: Path,
    samples: Iterable[Good | SampleError],
    name: str,
    samples_per_shard: int,
    max_bad_share: float,
    progress: Callable[[int], None] | None,
) -> BuildReport:
    """Writes the good ones of `samples` aside, checks the share of bad ones, and publishes the shards."""
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share is {max_bad_share}; it is a share, from 0 to 1")
    out = out.absolute()
    # Shards are named after their folder, so the unfinished one has the final name in a folder of its own.
    unfinished = out.parent / f".{out.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    tally = _Tally()
    try:
        shards = write_shards(tally.sift(samples, progress), unfinished / out.name, samples_per_shard=samples_per_shard)
        tally.check(name, max_bad_share)
        _publish(unfinished / out.name, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    paths = tuple(out / shard.name for shard in shards)
    return BuildReport(tally.read, tally.read - len(tally.errors), tuple(tally.errors), paths)


class _Tally:
    """Counts the samples that pass and keeps the errors of those that do not."""

    def __init__(self) -> None:
        self.read = 0
        self.errors: list[SampleError] = []

    def sift(self, samples: Iterable[Good | SampleError], progress: Callable[[int], None] | None) -> Iterator[Good]:
        """Yields the good samples."""
        for sample in samples:
            self.read += 1
            if isinstance(sample, SampleError):
                self.errors.append(sample)
            else:
                yield sample
            if progress:
                progress(self.read)

    def check(self, name: str, max_bad_share: float) -> None:
        """Raises ValueError if too few samples passed."""
        if self.read == 0:
            raise ValueError(f"{name} holds no records; is it the right file?")
        bad = len(self.errors)
        if bad > max_bad_share * self.read or bad == self.read:
            raise TooManyBadSamples(name, self.errors, self.read, max_bad_share)


def _publish(made: Path, out: Path) -> None:
    """Moves the finished folder to `out`, unless `out` holds the same shards already.

    Raises:
        ValueError: if `out` holds anything else.
    """
    if out.exists() and any(out.iterdir()):
        names = sorted(path.name for path in made.glob("*.tar"))
        same = names == sorted(path.name for path in out.glob("*.tar"))
        if not same or not all(filecmp.cmp(made / name, out / name, shallow=False) for name in names):
            raise ValueError(f"{out} holds other data; delete it or choose another folder")
        return  # what was made from these shards, such as their index, stays valid
    made.replace(out)


def from_record(key: str, data: bytes | Any, read: ReadMedia) -> Good | SampleError:
    """Returns the sample of one annotation record, or what is wrong with it.

    Args:
        data: the record, or its undecoded JSON.
        read: gives the bytes of a medium.
    """
    try:
        if isinstance(data, bytes):
            try:
                data = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise SampleError(key, "bad_record", f"the line is no JSON: {error}") from error
        record = parse_record(data, key=key)
        return _assemble(key, record, [read(file, key) for ref in record.media for file in ref.files])
    except SampleError as error:
        return error


def read_media_file(ref: MediaRef, root: Path, key: str) -> bytes:
    """Returns the bytes of a media file under `root`.

    Raises:
        SampleError: for a file that is not there, lies elsewhere, or cannot be read.
    """
    name = ref.ref.removeprefix("file://")
    if ADDRESS.match(name):
        raise SampleError(key, "missing_media", f"{name[:100]!r} is an address; download it and name the file")
    top = os.path.abspath(root)  # noqa: PTH100 - unlike resolve(), it keeps links, which data folders are made of
    path = Path(os.path.normpath(os.path.join(top, name)))  # noqa: PTH118
    if not path.is_relative_to(top):
        raise SampleError(key, "bad_record", f"{ref.ref!r} leads out of media_root {root}; move the file or set it")
    try:
        if not path.is_file():
            raise SampleError(key, "missing_media", f"{ref.ref!r} is no file in {root}; check media_root")
        if path.stat().st_size > MAX_MEMBER_BYTES:
            size = f"{path.stat().st_size} bytes; a shard member has at most {MAX_MEMBER_BYTES}"
            raise SampleError(key, f"unreadable_{ref.kind}", f"{ref.ref!r} has {size}: split or compress it")
        return path.read_bytes()
    except SampleError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise SampleError(key, "missing_media", f"{ref.ref!r} cannot be read: {error}") from error


def _from_tars(tars: Sequence[Path]) -> Iterator[Good | SampleError]:
    """Yields the samples of the tars, or what is wrong with them."""
    count = 0
    for tar in tars:
        reader = open_shard(tar).read_ahead()
        try:
            for key, members in scan_shard(reader):
                yield _from_members(f"{count:08d}", f"{tar.stem}/{key}", reader, members)
                count += 1
        finally:
            reader.close()


def _from_members(key: str, origin: str, reader: ShardReader, members: Sequence[Member]) -> Good | SampleError:
    """Returns one sample of a tar, or what is wrong with it."""
    by_name = {member.name: member for member in members}
    try:
        record = read_record(reader, origin, members)
        record = Record(record.messages, record.media, {"origin": origin} | record.meta)
        return _assemble(key, record, [reader.read(by_name[name]) for ref in record.media for name in ref.paths])
    except SampleError as error:
        return error


def _assemble(key: str, record: Record, contents: Sequence[bytes]) -> Good:
    """Returns the sample as it is written: `contents[i]` are the bytes of its i-th file."""
    names = stored_names(record.media)
    canonical = to_canonical(record, names)
    try:
        json.dumps(canonical, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SampleError(key, "bad_record", f"meta is no valid Unicode: {error}") from error
    return key, canonical, dict(zip(names, contents, strict=True))
