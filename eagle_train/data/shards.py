"""WebDataset tar shards: writing them, and listing the members of every sample."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from eagle_train.data.locations import Location, file_name, parent
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.storage import open_shard
from eagle_train.data.tar_headers import TarFile, tar_files

MAX_MEMBER_BYTES = (2 << 30) - 4096
"""Largest member that is read; more is a broken or hostile header."""

MAX_SHARD_BYTES = 2_000_000_000
"""A shard that has as much gets no more samples."""
MANIFEST = "shards.json"


TarSample = tuple[str, Mapping[str, Any], Mapping[str, bytes]]
"""Key, canonical record (see `schemas`) and media bytes by member extension."""


def write_shards(samples: Iterable[TarSample], folder: Path, *, samples_per_shard: int = 1000) -> list[Path]:
    """Writes samples as tar shards and returns their paths.

    A manifest beside them holds the samples of each, so that a shard lost later is noticed. The bytes
    depend on the samples alone (no times, no user names), so equal data gives equal shards.

    Args:
        folder: created if needed; shards are `<folder name>-000000.tar`, ...

    Raises:
        ValueError: for a key with a dot or a slash, which WebDataset would split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / f"{folder.name}-{number:06d}.tar" for number in count())
    counts = write_tars(samples, paths, samples_per_shard)
    write_manifest(folder, {path.name: number for path, number in counts.items()})
    return list(counts)


def write_tars(
    samples: Iterable[TarSample],
    paths: Iterator[Path],
    max_samples: int | None = None,
    max_bytes: int = MAX_SHARD_BYTES,
) -> dict[Path, int]:
    """Writes samples into tars and returns how many each has; a tar appears when it is whole.

    Args:
        paths: of the tars, as many as it takes; the next one is begun when one has `max_samples` or `max_bytes`.
            Without samples there is none.

    Raises:
        ValueError: as `write_shards`.
    """
    counts: dict[Path, int] = {}
    samples = iter(samples)
    for first in samples:
        path = next(paths)
        counts[path] = _write_tar(chain([first], samples), path, max_samples, max_bytes)
    return counts


def _write_tar(samples: Iterator[TarSample], path: Path, max_samples: int | None, max_bytes: int) -> int:
    """Writes samples until the tar has enough; returns how many it has."""
    import webdataset  # it imports torch, which readers of records need not wait for

    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    size = number = 0
    try:
        with aside.open("wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
            for key, record, media in samples:
                if "." in key or "/" in key:
                    raise ValueError(f"sample key {key!r} may not contain a dot or a slash")
                size += writer.write({"__key__": key, "json": encode_record(record), **media})
                number += 1
                if number == max_samples or size >= max_bytes:
                    break
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return number


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Returns the JSON of a record, the same for equal records."""
    return json.dumps(record, ensure_ascii=False, sort_keys=True).encode()


def write_manifest(folder: Path, counts: Mapping[str, int]) -> None:
    """Writes how many samples each shard of a folder has."""
    (folder / MANIFEST).write_text(json.dumps(counts, indent=1))


def expected_shards(folder: Path) -> dict[str, int]:
    """Returns the samples of every shard that was written to `folder`; empty if it has no manifest."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else {}


def num_expected(shard: Location, read: Callable[[Path], Mapping[str, int]] = expected_shards) -> int:
    """Returns how many samples the manifest beside a shard says it has; 0 if it says nothing.

    Args:
        read: gives the manifest of a folder; one that remembers, for many shards.
    """
    folder = parent(shard)
    return read(folder).get(file_name(shard), 0) if isinstance(folder, Path) else 0


def scan_shard(shard: ShardReader | Location) -> Iterator[tuple[str, list[Member]]]:
    """Yields the key and members of every sample of a tar, from its headers alone.

    Members of one sample stand next to each other, as WebDataset demands; a member may occur twice, see
    `repeated_member`, or be refused, see `why_refused`. Folders and hidden files (`.DS_Store`) are passed over. The
    shard is read from start to end; who reads the members as well should give a `ShardReader.read_ahead`.

    Raises:
        ValueError: at the first damage, after the samples that are surely whole.
        OSError: if the shard cannot be read.
    """
    reader = (shard if isinstance(shard, ShardReader) else open_shard(shard)).read_ahead()
    key, members = None, []
    for file in tar_files(reader):
        name, extension = split_name(file.name)
        if extension is None:
            continue
        if name != key:
            if members:
                yield key, members
            key, members = name, []
        members.append(Member(extension, file.offset, file.size, why_refused(file)))
    if members:
        yield key, members


def why_refused(file: TarFile) -> str:
    """Returns why a tar member may not be read: it is no plain file, or not of a sane name and size; empty if it may.

    Only its sample is lost by that: what stands behind it in the tar can be read.
    """
    if file.refused:
        return f"member {file.name!r} is {file.refused}; only plain files are read"
    if file.name.startswith("/") or (".." in file.name and ".." in file.name.split("/")):
        return f"member {file.name!r} points outside the archive"
    if file.size > MAX_MEMBER_BYTES:
        return f"member {file.name!r} has {file.size} bytes (limit {MAX_MEMBER_BYTES})"
    return ""


def split_name(name: str) -> tuple[str, str | None]:
    """Returns the sample's key and the member's extension in lower case: `a/7.Seg.png` is `a/7` and `seg.png`.

    The extension of a hidden file is None; that of a file without a dot is empty.
    """
    if "./" in name or "//" in name:
        name = "/".join(part for part in name.split("/") if part not in ("", "."))
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower() if stem else None


def repeated_member(members: Sequence[Member]) -> str | None:
    """Returns the name of a member that a sample has twice, if any: which one is meant, nobody knows."""
    if len({member.name for member in members}) == len(members):
        return None
    counts = Counter(member.name for member in members)
    return next((name for name, count in counts.items() if count > 1), None)
