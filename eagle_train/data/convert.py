"""Records of existing data sets become canonical samples, one by one: from annotations, or from WebDataset tars.

Media are copied byte for byte. What cannot be used is returned as an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eagle_train.data.elsewhere import Elsewhere
from eagle_train.data.index import read_record
from eagle_train.data.media_files import read_media_file
from eagle_train.data.placeholders import MediaRef
from eagle_train.data.schemas import Record, parse_record, stored_names, to_canonical
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.shards import TarSample
from eagle_train.types import SampleError

ReadMedia = Callable[[MediaRef, str], bytes]
"""Takes a medium and the key of its sample."""


def from_record(key: str, data: bytes | Any, read: ReadMedia) -> TarSample | SampleError:
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


def from_members(
    key: str, origin: str, reader: ShardReader, members: Sequence[Member], media_root: Path | None = None
) -> TarSample | SampleError:
    """Returns one sample of a tar, or what is wrong with it.

    Args:
        origin: tells where the sample comes from; goes into its `meta` and into errors.
        members: of the sample, read through `reader`.
        media_root: folder of files that the record names beside its members; None: it may name none.
    """
    by_name = {member.name: member for member in members}
    try:
        record = read_record(reader, origin, members, elsewhere=Elsewhere(media_root).may_hold)
        record = Record(record.messages, record.media, {"origin": origin} | record.meta)
        files = [file for ref in record.media for file in ref.files]
        contents = [
            reader.read(by_name[file.ref]) if file.ref in by_name else read_media_file(file, media_root, origin)
            for file in files
        ]
        return _assemble(key, record, contents)
    except SampleError as error:
        return error


def _assemble(key: str, record: Record, contents: Sequence[bytes]) -> TarSample:
    """Returns the sample as it is written: `contents[i]` are the bytes of its i-th file."""
    names = stored_names(record.media)
    canonical = to_canonical(record, names)
    try:
        json.dumps(canonical, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SampleError(key, "bad_record", f"meta is no valid Unicode: {error}") from error
    return key, canonical, dict(zip(names, contents, strict=True))
