"""Samples read again by the rows of their index."""

from __future__ import annotations

from eagle_train.data.canonical import canonical_messages
from eagle_train.data.elsewhere import Elsewhere, SampleFiles
from eagle_train.data.index import TEXT_MEMBERS, sample_key
from eagle_train.data.json_fields import load_object
from eagle_train.data.schemas import anywhere, parse_object
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.types import Media, Sample


def read_sample(reader: ShardReader, source: str, row: dict) -> Sample:
    """Returns the sample of one index row, without its media bytes."""
    return open_sample(reader, source, row, Elsewhere())[0]


def open_sample(
    reader: ShardReader, source: str, row: dict, elsewhere: Elsewhere, *, with_text: bool = True
) -> tuple[Sample, SampleFiles]:
    """Returns the sample of one index row whose record was found good when it was indexed, and its media files.

    Args:
        source: its name.
        elsewhere: where files are that are no members.
        with_text: False: the sample may come without messages and meta, and its record is read only where it names
            files outside of the shard.

    Raises:
        SampleError: if the record is not what it was.
    """
    key = sample_key(source, reader.location, row["key"])
    media = tuple([Media(**medium) for medium in row["media"]])
    if not with_text and not row["outside"]:
        return Sample(key=key, source=source, messages=(), media=media), SampleFiles(reader, key, row, (), elsewhere)
    members = [Member(**member) for member in row["members"]]
    contents = {m.name: reader.read(m) if m.name in TEXT_MEMBERS else b"" for m in members}
    record = load_object(contents["json"], key) if "json" in contents else {}
    # Where a record names files outside, its names are needed too.
    messages = None if row["outside"] else canonical_messages(record, len(media))
    if messages is not None:
        sample = Sample(key=key, source=source, messages=messages, media=media, meta=record["meta"])
        return sample, SampleFiles(reader, key, row, (), elsewhere)
    parsed = parse_object(record, contents, key=key, elsewhere=anywhere)
    sample = Sample(key=key, source=source, messages=parsed.messages, media=media, meta=parsed.meta)
    return sample, SampleFiles(reader, key, row, parsed.media, elsewhere)
