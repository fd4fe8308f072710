"""The small file beside each shard: what its samples are, read from headers, no pixel decoded.

One Arrow file per shard, a row per sample: key, byte ranges of the members, header facts of the media, and what is
wrong with it, if anything. Its metadata hold a digest of the content, so that a data set is known, and a shard that
changed is named, without reading any rows. Text lengths are beside it, see `lengths`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from eagle_train.data.digests import digest_of
from eagle_train.data.elsewhere import Elsewhere, Outside, find_files
from eagle_train.data.locations import Location, file_name, parent, shown, stem
from eagle_train.data.probe import probe_medium
from eagle_train.data.schemas import Record, anywhere, parse_members
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.shards import num_expected, repeated_member, scan_shard
from eagle_train.data.storage import Storage, open_shard
from eagle_train.data.tables import DamagedTable, read_metadata, write_table
from eagle_train.types import Media, SampleError

INDEX_VERSION = "8"
TEXT_MEMBERS = frozenset({"json", "txt"})
MEMBERS_OR_WEB = Elsewhere()
BLOCK = 512
"""Bytes; tar headers start at multiples of it."""
MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
OUTSIDE = pa.struct([("name", pa.string()), ("size", pa.int64()), ("identity", pa.string())])
MEDIA = pa.struct(
    [
        ("kind", pa.string()),
        ("member", pa.string()),
        ("members", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("orientation", pa.int8()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("duration", pa.float64()),
        ("num_frames", pa.int32()),
        ("min_pixels", pa.int64()),
        ("max_pixels", pa.int64()),
        ("total_pixels", pa.int64()),
        ("resized_width", pa.int32()),
        ("resized_height", pa.int32()),
        ("fps", pa.float64()),
        ("nframes", pa.int32()),
        ("min_frames", pa.int32()),
        ("max_frames", pa.int32()),
    ]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("members", pa.list_(MEMBER)),
        ("media", pa.list_(MEDIA)),
        ("outside", pa.list_(OUTSIDE)),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

Visit = Callable[[Record | None], None]
"""Is given the record of every row as it is read, None for a bad one."""


@dataclass(slots=True)
class Row:
    """A row of the index."""

    key: str
    members: Sequence[Member] = ()
    media: Sequence[Media] = field(default_factory=list)
    outside: Sequence[Outside] = ()
    """Files of the media that are no members."""
    reason: str | None = None
    detail: str | None = None


def index_path(shard: Location, index_dir: Path | None) -> Path:
    """Returns where the index of `shard` is: beside it, or in `index_dir`."""
    return Path(f"{index_stem(shard, index_dir)}.index.arrow")  # `with_suffix` would cut `llava-v1.5-000000` at its dot


def index_stem(shard: Location, index_dir: Path | None) -> Path:
    """Returns the common stem of a shard's index files; one `index_dir` may serve sets whose folders have other names.

    Raises:
        ValueError: for a remote shard without `index_dir`.
    """
    if index_dir is not None:
        return index_dir / f"{file_name(parent(shard))}-{stem(shard)}"
    if isinstance(shard, Path):
        return shard.with_suffix("")
    raise ValueError(f"the index of {shown(shard)} cannot be beside it; set index_dir to a folder")


def shard_identity(shard: Location, storage: Storage | None = None) -> bytes:
    """Returns what tells a shard from a rebuilt one, from its size and a hash of its ends."""
    reader = open_shard(shard, storage)
    try:
        return reader.identity().encode()
    finally:
        reader.close()


def ensure_index(
    shard: Location,
    index_dir: Path | None = None,
    visit: Visit | None = None,
    media_root: Path | None = None,
    storage: Storage | None = None,
) -> Path:
    """Builds the index of `shard` unless it has one that is whole and fits the shard; returns its path.

    Args:
        visit: is called while the index is built, so not at all if there is one.
        media_root: folder of files that its records may name, see `Elsewhere`.
        storage: how the shard is read; None: as by default.
    """
    path = index_path(shard, index_dir)
    if not has_index(shard, index_dir, media_root, storage):
        # Before it is read: should it change meanwhile, it is indexed again.
        made_of = identity(shard, media_root, storage)
        elsewhere = Elsewhere(media_root, (storage or Storage()).retries())
        table = index_shard(shard, visit, elsewhere, storage)
        write_table(table.replace_schema_metadata(made_of | table.schema.metadata), path)
    return path


def has_index(
    shard: Location, index_dir: Path | None, media_root: Path | None = None, storage: Storage | None = None
) -> bool:
    """Returns whether `shard` has an index that fits it as it is now."""
    return is_current(index_path(shard, index_dir), partial(identity, shard, media_root, storage))


def identity(shard: Location, media_root: Path | None, storage: Storage | None = None) -> dict[bytes, bytes]:
    """Returns the metadata that tie an index to its shard, and to the folder where else its media may be."""
    root = "" if media_root is None else str(media_root.absolute())
    return {b"version": INDEX_VERSION.encode(), b"shard": shard_identity(shard, storage), b"media_root": root.encode()}


def is_current(path: Path, made_of: Callable[[], dict[bytes, bytes]]) -> bool:
    """Returns whether a table is there, is not cut short, and has these metadata; its rows are not read.

    Args:
        made_of: gives the metadata; asked only if there is a table, for the answer may take requests to a storage.
    """
    try:
        metadata = read_metadata(path)
    except (FileNotFoundError, NotADirectoryError, DamagedTable):
        return False
    return all(metadata.get(name) == value for name, value in made_of().items())


def index_shard(
    shard: Location,
    visit: Visit | None = None,
    elsewhere: Elsewhere = MEMBERS_OR_WEB,
    storage: Storage | None = None,
) -> pa.Table:
    """Returns the index of `shard`, see `SCHEMA`, with a `digest` of its content in the metadata.

    The digest covers keys, names and sizes of members, the bytes of texts, facts of the media, the identity of those
    outside, and reasons; not the bytes of members, nor where in the shard they are. Where the tar is damaged, the whole
    samples before that are indexed, and one bad row stands for all that follow: where a manifest beside the shard says
    how many samples it had, a bad row for each of those that are gone.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    texts = hashlib.sha256()
    reader = open_shard(shard, storage).read_ahead()
    for row in scan_rows(reader):
        record = None
        try:
            if row.key in seen:
                raise SampleError(row.key, "bad_record", "the key occurs twice in this shard")
            if row.reason is None:
                record = probe_sample(reader, row, texts.update, elsewhere)
        except SampleError as error:
            row.reason, row.detail = error.reason, error.detail
        seen.add(row.key)
        rows.append(row)
        if visit:
            visit(record)
    reader.close()
    table = to_table(rows)
    return table.replace_schema_metadata({b"digest": digest_of(table, texts.digest())})


def scan_rows(reader: ShardReader) -> Iterator[Row]:
    """Yields a row of key and members per whole sample, and bad ones for what follows them in a damaged tar."""
    count, end = 0, 0
    try:
        for key, members in scan_shard(reader):
            count, end = count + 1, max(member.offset + member.size for member in members)
            yield Row(key, members)
    except ValueError as error:
        start = -(-end // BLOCK) * BLOCK
        detail = f"nothing can be read from byte {start} on, after {count} whole samples: {error}"
        yield Row(f"rest from byte {start}", reason="missing_shard", detail=detail)
        for number in range(count + 2, num_expected(reader.location) + 1):
            yield Row(f"rest from byte {start}, sample {number}", reason="missing_shard", detail=detail)


def probe_sample(reader: ShardReader, row: Row, hash_text: Callable[[bytes], object], elsewhere: Elsewhere) -> Record:
    """Fills in the header facts of a sample's media; returns its record.

    Raises:
        SampleError: for a bad record or unreadable media.
        StorageError: if a web server does not answer.
    """
    record = read_record(reader, row.key, row.members, hash_text, elsewhere=elsewhere.may_hold)
    files, outside = find_files(reader, row.key, row.members, record.media, elsewhere)
    row.media = [probe_medium(row.key, *pair) for pair in zip(record.media, files, strict=True)]
    row.outside = outside
    return record


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Returns the rows as columns."""
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    arrays = [
        to_lists(columns[item.name], item.type.value_type)
        if pa.types.is_list(item.type)
        else pa.array(columns[item.name], item.type)
        for item in SCHEMA
    ]
    return pa.table(arrays, schema=SCHEMA)


def to_lists(groups: Sequence[Sequence], kind: pa.StructType) -> pa.ListArray:
    """Returns groups of objects as lists of structs; far faster than to convert dictionaries."""
    flat = list(chain.from_iterable(groups))
    offsets = np.cumsum([0, *map(len, groups)], dtype=np.int32)
    values = [pa.array([getattr(item, part.name) for item in flat], part.type) for part in kind]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(values, fields=list(kind)))


def read_record(
    reader: ShardReader,
    key: str,
    members: Sequence[Member],
    visit_text: Callable[[bytes], object] = lambda content: None,
    *,
    elsewhere: Callable[[str], bool] = anywhere,
) -> Record:
    """Returns the parsed record of a sample; media members are named, not read.

    Args:
        visit_text: is given the content of each text.
        elsewhere: see `parse_members`.

    Raises:
        SampleError: see `parse_members`; `bad_record` also for two members of one extension, and refused ones.
    """
    if refused := next((member.refused for member in members if member.refused), ""):
        raise SampleError(key, "bad_record", refused)
    if repeated := repeated_member(members):
        raise SampleError(key, "bad_record", f"member {repeated!r} occurs twice")
    contents = {m.name: reader.read(m) if m.name in TEXT_MEMBERS else b"" for m in members}
    for content in contents.values():
        visit_text(content)
    return parse_members(contents, key=key, elsewhere=elsewhere)


def read_records(shard: Location, index: pa.Table, storage: Storage | None = None) -> Iterator[Record | None]:
    """Yields the records of an indexed shard in the order of its rows, None for a bad one."""
    reader = open_shard(shard, storage)
    for row in index.select(["key", "members", "reason"]).to_pylist():
        members = [Member(**member) for member in row["members"]]
        yield None if row["reason"] else read_record(reader, row["key"], members)
    reader.close()


def sample_key(source: str, shard: Location, key: str) -> str:
    """Returns the key that names a sample everywhere: `<source>/<shard stem>/<tar key>`."""
    return f"{source}/{stem(shard)}/{key}"
