"""WebDataset tar shards: writing them, listing their members, reading members by byte range."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset

MAX_MEMBER_BYTES = (2 << 30) - 4096
"""Largest member that is read: what one Linux `pread` returns; more is a broken or hostile header."""

MANIFEST = "shards.json"


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample inside a tar."""

    name: str
    """Extension after the sample's key, for example `json` or `0.png`."""
    offset: int
    """Bytes from the start of the tar to the first byte of the content."""
    size: int
    """Bytes."""


def write_shards(
    samples: Iterable[tuple[str, Mapping[str, Any], Mapping[str, bytes]]],
    folder: Path,
    *,
    samples_per_shard: int = 1000,
) -> list[Path]:
    """Writes `(key, record, media)` samples as tar shards and returns their paths.

    A manifest beside them holds the samples of each, so that a shard lost later is noticed. The bytes
    depend on the samples alone (no times, no user names), so equal data gives equal shards.

    Args:
        samples: key, canonical record (see `schemas`) and media bytes by member extension.
        folder: created if needed; shards are `<folder name>-000000.tar`, ...

    Raises:
        ValueError: for a key with a dot or a slash, which WebDataset would split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"{folder}/{folder.name}-%06d.tar"
    paths: list[str] = []
    counts: dict[str, int] = {}
    with webdataset.ShardWriter(
        pattern, maxcount=samples_per_shard, maxsize=2e9, post=paths.append, verbose=0, mtime=0, encoder=False
    ) as writer:
        for key, record, media in samples:
            if "." in key or "/" in key:
                raise ValueError(f"sample key {key!r} may not contain a dot or a slash")
            writer.write({"__key__": key, "json": encode_record(record), **media})
            name = Path(writer.fname).name
            counts[name] = counts.get(name, 0) + 1
    write_manifest(folder, counts)
    return [Path(path) for path in paths]


def write_shard(samples: Iterable[tuple[str, Mapping[str, Any], Mapping[str, bytes]]], path: Path) -> None:
    """Writes one shard, see `write_shards`; it appears when it is whole."""
    aside = path.with_name(f"{path.name}.partial")
    with aside.open("wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
        for key, record, media in samples:
            writer.write({"__key__": key, "json": encode_record(record), **media})
    aside.replace(path)


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


def scan_shard(path: Path) -> Iterator[tuple[str, list[Member]]]:
    """Yields the key and members of every sample of a tar, from its headers alone.

    Members of one sample stand next to each other, as WebDataset demands.

    Raises:
        ValueError: for an unreadable tar, links, path tricks or absurd sizes.
    """
    key, members = None, []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                check_member(path, info)
                path_name = info.name if "//" not in info.name and "./" not in info.name else str(Path(info.name))
                folder, slash, file_name = path_name.rpartition("/")
                stem, _, extension = file_name.partition(".")
                name = folder + slash + stem
                if name != key:
                    if members:
                        yield key, members
                    key, members = name, []
                members.append(Member(extension.lower(), info.offset_data, info.size))
            check_end(tar)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is not a whole tar ({error}); build or download it again") from error
    if members:
        yield key, members


def check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError unless the end mark follows the last member: tarfile takes damage there for the end."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        what = "is no header" if len(block) == tarfile.BLOCKSIZE else "should be the end mark, the file ends before it"
        raise tarfile.ReadError(f"what comes at byte {tar.offset} {what}")


def check_member(path: Path, info: tarfile.TarInfo) -> None:
    """Raises ValueError for a tar member that is no plain file of a sane name and size."""
    if not info.isfile():
        raise ValueError(f"{path}: member {info.name!r} is a link or a device; only plain files are read")
    if info.name.startswith("/") or ".." in info.name.split("/"):
        raise ValueError(f"{path}: member {info.name!r} points outside the archive")
    if info.size > MAX_MEMBER_BYTES:
        raise ValueError(f"{path}: member {info.name!r} claims {info.size} bytes (limit {MAX_MEMBER_BYTES})")


class ShardReader:
    """Reads members of one open shard by byte range; safe to share between threads and forks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, member: Member) -> bytes:
        """Returns the content of `member`.

        Raises:
            OSError: if the file ends before the member does.
        """
        data = os.pread(self._descriptor, member.size, member.offset)
        if len(data) != member.size:
            raise OSError(f"{self.path}: member {member.name} has {len(data)} of {member.size} bytes")
        return data

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)
