"""The small file beside each shard: what its samples are, read from headers, no pixel decoded.

One Parquet file per shard, a row per sample: key, byte ranges of the members, header facts of the media,
and what is wrong with it, if anything. A second file holds the text lengths under one tokenizer and
template, named by their fingerprint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eagle_train.data.media import MediaError, probe_image, probe_video
from eagle_train.data.schemas import Record, parse_members
from eagle_train.data.shards import Member, ShardReader, scan_shard
from eagle_train.types import Media, Message, Sample, SampleError

INDEX_VERSION = "1"
MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
MEDIA = pa.struct(
    [
        ("kind", pa.string()),
        ("member", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
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
MEDIA_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"} | {
    "mp4", "avi", "mov", "mkv", "webm", "m4v",
}  # fmt: skip


def index_path(shard: Path, index_dir: Path | None) -> Path:
    """Returns where the index of `shard` is: beside it, or in `index_dir`."""
    return (index_dir or shard.parent) / f"{shard.stem}.index.parquet"


def lengths_path(shard: Path, index_dir: Path | None, fingerprint: str) -> Path:
    """Returns where the text lengths of `shard` under one tokenizer and template are."""
    return (index_dir or shard.parent) / f"{shard.stem}.lengths-{fingerprint}.parquet"


def ensure_index(shard: Path, index_dir: Path | None = None) -> Path:
    """Builds the index of `shard` unless it has one that fits the shard's size; returns its path."""
    path = index_path(shard, index_dir)
    if path.exists():
        metadata = pq.read_schema(path).metadata or {}
        expected = {b"version": INDEX_VERSION.encode(), b"shard_bytes": str(shard.stat().st_size).encode()}
        if all(metadata.get(name) == value for name, value in expected.items()):
            return path
    write_table(index_shard(shard), path)
    return path


def index_shard(shard: Path) -> pa.Table:
    """Returns the index of `shard`, see `SCHEMA`."""
    reader = ShardReader(shard)
    rows, seen = [], set()
    for key, members in scan_shard(shard):
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
    metadata = {"version": INDEX_VERSION, "shard_bytes": str(shard.stat().st_size)}
    return pa.Table.from_pylist(rows, SCHEMA.with_metadata(metadata))


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
                width, height = probe_image(data)
                media.append(Media(kind="image", member=ref.ref, width=width, height=height))
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
    contents = {m.name: b"" if is_media(m.name) else reader.read(m) for m in members}
    return parse_members(contents, key=key)


def is_media(name: str) -> bool:
    """Returns whether a member extension is that of an image or a video."""
    return name.rpartition(".")[2] in MEDIA_SUFFIXES


def sample_key(source: str, shard: Path, key: str) -> str:
    """Returns the key that names a sample everywhere: `<source>/<shard stem>/<tar key>`."""
    return f"{source}/{shard.stem}/{key}"


def read_sample(reader: ShardReader, source: str, row: dict) -> Sample:
    """Returns the sample of one index row, without its media bytes."""
    members = [Member(**member) for member in row["members"]]
    record = read_record(reader, row["key"], members)
    media = tuple(Media(**medium) for medium in row["media"])
    return Sample(
        key=sample_key(source, reader.path, row["key"]),
        source=source,
        messages=record.messages,
        media=media,
        meta=record.meta,
    )


def ensure_lengths(
    shard: Path,
    index_dir: Path | None,
    fingerprint: str,
    text_length: Callable[[Sequence[Message]], tuple[int, int]],
) -> np.ndarray:
    """Returns (n, 2) int32: text tokens and supervised tokens of every sample; bad samples have (0, 0).

    Built once per tokenizer and template (`fingerprint`) and kept beside the index.
    """
    path = lengths_path(shard, index_dir, fingerprint)
    index = pq.read_table(ensure_index(shard, index_dir))
    if path.exists() and pq.read_metadata(path).num_rows == index.num_rows:
        table = pq.read_table(path)
        return np.stack([table["text"].to_numpy(), table["supervised"].to_numpy()], axis=1)
    reader = ShardReader(shard)
    lengths = np.zeros((index.num_rows, 2), dtype=np.int32)
    for i, row in enumerate(index.to_pylist()):
        if row["reason"] is None:
            members = [Member(**member) for member in row["members"]]
            lengths[i] = text_length(read_record(reader, row["key"], members).messages)
    reader.close()
    write_table(pa.table({"text": lengths[:, 0], "supervised": lengths[:, 1]}), path)
    return lengths


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file aside and publishes it by rename, so readers never see half of one.

    Raises:
        ValueError: if the folder is not writable; the remedy is `index_dir`.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, aside, compression="zstd")
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error}); set index_dir to a writable folder") from error
    aside.replace(path)
