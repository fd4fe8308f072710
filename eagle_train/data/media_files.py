"""Media files of this machine, below the folder that they may be in."""

from __future__ import annotations

import os
from pathlib import Path

from eagle_train.data.media_sources import FILE, is_address, read_address
from eagle_train.data.placeholders import MediaRef
from eagle_train.data.shards import MAX_MEMBER_BYTES
from eagle_train.types import SampleError


def read_media_file(ref: MediaRef, root: Path | None, key: str) -> bytes:
    """Returns the bytes of a media file under `root`, or at an address that the record gives, see `media_sources`.

    Args:
        root: see `find_media_file`.

    Raises:
        SampleError: for a file that is not there, lies elsewhere, or cannot be read.
    """
    if is_address(ref.ref):
        return read_address(ref, key)
    path = find_media_file(ref, root, key)
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(key, "missing_media", f"{ref.ref!r} cannot be read: {error}") from error


def find_media_file(ref: MediaRef, root: Path | None, key: str) -> Path:
    """Returns where a media file is, of a path or a `file://` address.

    Args:
        root: folder that paths start from and may not lead out of; None: the working folder, and they may.

    Raises:
        SampleError: for a file that is not there, lies elsewhere, or is too large.
    """
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
    except SampleError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise SampleError(key, "missing_media", f"{ref.ref!r} cannot be read: {error}") from error
    return path
