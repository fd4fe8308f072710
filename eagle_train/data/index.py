"""The small file beside each shard: what its samples are, read from headers, no pixel decoded.

One Parquet file per shard, a row per sample: key, byte ranges of the members, header facts of the media,
and what is wrong with it, if anything. A second file holds the text lengths up to each answer under one
tokenizer and template, named by their fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from eagle_train.data.images import probe_image
from eagle_train.data.locations import Location, stem
from eagle_train.data.media import MediaError
from eagle_train.data.placeholders import media_kind
from eagle_train.data.schemas import Record, parse_members
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.shards import repeated_member, scan_shard
from eagle_train.data.storage import open_shard
from eagle_train.data.tables import read_metadata, write_table
from eagle_train.data.videos import probe_video
from eagle_train.types import Media, Sample, SampleError

INDEX_VERSION = b"1"
ENDS_BYTES = 1 << 16
MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
MEDIA = pa.struct(
    [
        ("kind", pa.string()),
        ("member", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("orientation", pa.int8()),
        ("duration", pa.float64()),
        ("num_frames", pa.int32()),
    ]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("members", pa.list_(MEMBER)),
        ("media", pa.list_(MEDIA)),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


def index_path(shard: Path, index_dir: Path | None) -> Path:
    """Returns where the index of `shard` is: beside it, or in `index_dir`."""
    return index_stem(shard, index_dir).with_suffix(".index.arrow")


def index_stem(shard: Path, index_dir: Path | None) -> Path:
    """Returns the common stem of a shard's index files; one `index_dir` may serve several data sets."""
    return shard.with_suffix("") if index_dir is None else index_dir / f"{shard.parent.name}-{shard.stem}"


def shard_identity(shard: Path) -> bytes:
    """Returns what tells a shard from a rebuilt one, from its size and a hash of its ends."""
    reader = open_shard(shard)
    identity = reader.identity().encode()
    reader.close()
    return identity


def ensure_index(shard: Path, index_dir: Path | None = None) -> Path:
    """Builds the index of `shard` unless it has one that fits the shard's size; returns its path."""
    path = index_path(shard, index_dir)
    if not is_of(path, shard):
        table = index_shard(shard)
        digest = hashlib.sha256(repr(table.to_pylist()).encode()).hexdigest()[:16].encode()
        write_table(table.replace_schema_metadata(identity_metadata(shard) | {b"digest": digest}), path)
    return path


def is_of(path: Path, shard: Path) -> bool:
    """Returns whether an index file is there and was made from `shard` as it is now."""
    metadata = read_metadata(path)
    return all(metadata.get(name) == value for name, value in identity_metadata(shard).items())


def identity_metadata(shard: Path) -> dict[bytes, bytes]:
    """Returns the Parquet metadata that ties an index file to its shard."""
    return {b"version": INDEX_VERSION, b"shard": shard_identity(shard)}


def index_shard(shard: Path) -> pa.Table:
    """Returns the index of `shard`, see `SCHEMA`."""
    reader = open_shard(shard).read_ahead()
    rows, seen = [], set()
    for key, members in scan_shard(reader):
        row = {"key": key, "members": [asdict(m) for m in members], "media": [], "reason": None, "detail": None}
        try:
            if key in seen:
                raise SampleError(key, "bad_record", "the key occurs twice in this shard")
            row["media"] = [asdict(medium) for medium in probe_sample(reader, key, members)]
        except SampleError as error:
            row["reason"], row["detail"] = error.reason, error.detail
        seen.add(key)
        rows.append(row)
    reader.close()
    return pa.Table.from_pylist(rows, SCHEMA)


def probe_sample(reader: ShardReader, key: str, members: Sequence[Member]) -> list[Media]:
    """Returns the header facts of a sample's media.

    Raises:
        SampleError: for a bad record or unreadable media.
    """
    record = read_record(reader, key, members)
    by_name = {member.name: member for member in members}
    media = []
    for ref in record.media:
        data = reader.read(by_name[ref.ref])
        try:
            if ref.kind == "image":
                width, height, orientation = probe_image(data)
                media.append(Media(kind="image", member=ref.ref, width=width, height=height, orientation=orientation))
            else:
                width, height, duration, frames = probe_video(data)
                media.append(
                    Media(
                        kind="video", member=ref.ref, width=width, height=height, duration=duration, num_frames=frames
                    )
                )
        except MediaError as error:
            raise SampleError(key, error.reason, f"{ref.ref}: {error}") from error
    return media


def read_record(reader: ShardReader, key: str, members: Sequence[Member]) -> Record:
    """Returns the parsed record of a sample; media members are named, not read."""
    if repeated := repeated_member(members):
        raise SampleError(key, "bad_record", f"member {repeated!r} occurs twice")
    contents = {m.name: b"" if media_kind(m.name) else reader.read(m) for m in members}
    return parse_members(contents, key=key)


def sample_key(source: str, shard: Location, key: str) -> str:
    """Returns the key that names a sample everywhere: `<source>/<shard stem>/<tar key>`."""
    return f"{source}/{stem(shard)}/{key}"


def read_sample(reader: ShardReader, source: str, row: dict) -> Sample:
    """Returns the sample of one index row, without its media bytes."""
    members = [Member(**member) for member in row["members"]]
    key = sample_key(source, reader.location, row["key"])
    record = read_record(reader, key, members)
    media = tuple(Media(**medium) for medium in row["media"])
    return Sample(
        key=key,
        source=source,
        messages=record.messages,
        media=media,
        meta=record.meta,
    )
