"""Records of existing data sets become canonical samples, one by one: from annotations, or from WebDataset tars.

Media are copied byte for byte. What cannot be used is returned as an error that names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eagle_train.data.index import read_record
from eagle_train.data.media_sources import FILE, is_address, read_address
from eagle_train.data.placeholders import MediaRef
from eagle_train.data.schemas import Record, parse_record, stored_names, to_canonical
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.shards import MAX_MEMBER_BYTES, TarSample
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


def read_media_file(ref: MediaRef, root: Path | None, key: str) -> bytes:
    """Returns the bytes of a media file under `root`, or at an address that the record gives, see `media_sources`.

    Args:
        root: folder that paths start from and may not lead out of; None: the working folder, and they may.

    Raises:
        SampleError: for a file that is not there, lies elsewhere, or cannot be read.
    """
    if is_address(ref.ref):
        return read_address(ref, key)
    name = ref.ref.removeprefix(FILE)
    top = os.path.abspath(root or ".")  # noqa: PTH100 - unlike resolve(), it keeps links, which data folders are made of
    path = Path(os.path.normpath(os.path.join(top, name)))  # noqa: PTH118
    remedy = "" if root is None else "; check media_root"
    if root is not None and not path.is_relative_to(top):
        raise SampleError(key, "bad_record", f"{ref.ref!r} leads out of media_root {root}; move the file or set it")
    try:
        if not path.is_file():
            raise SampleError(key, "missing_media", f"{ref.ref!r} is no file in {root or top}{remedy}")
        if path.stat().st_size > MAX_MEMBER_BYTES:
            size = f"{path.stat().st_size} bytes; a shard member has at most {MAX_MEMBER_BYTES}"
            raise SampleError(key, f"unreadable_{ref.kind}", f"{ref.ref!r} has {size}: split or compress it")
        return path.read_bytes()
    except SampleError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise SampleError(key, "missing_media", f"{ref.ref!r} cannot be read: {error}") from error


def from_members(key: str, origin: str, reader: ShardReader, members: Sequence[Member]) -> TarSample | SampleError:
    """Returns one sample of a tar, or what is wrong with it.

    Args:
        origin: tells where the sample comes from; goes into its `meta` and into errors.
        members: of the sample, read through `reader`.
    """
    by_name = {member.name: member for member in members}
    try:
        record = read_record(reader, origin, members, addresses=True)
        record = Record(record.messages, record.media, {"origin": origin} | record.meta)
        files = [file for ref in record.media for file in ref.files]
        contents = [reader.read(by_name[f.ref]) if f.ref in by_name else read_address(f, origin) for f in files]
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
