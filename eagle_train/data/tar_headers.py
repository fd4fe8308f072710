"""The files in a tar, from its headers alone: what `tarfile` reads, without its leniency.

`tarfile` takes a damaged header behind the first member for the end of the archive, and files after a first end
mark are lost on it; here both are errors, for a sample that is gone must be noticed. It also makes an object of
twenty fields of each header, which is most of the time of a scan.

Source of the formats: POSIX.1-2017, pax; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from eagle_train.data.shard_reader import ShardReader

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20
"""Of a long name or a PAX header; more is a broken or hostile header."""
MAX_TAIL_BYTES = 1 << 20
"""How much after the end mark must be zeros; `tar` pads to 10 KiB."""

FILE = frozenset({b"0", b"\0", b"7"})
FOLDER, LONG_NAME, LONG_LINK = b"5", b"L", b"K"
PAX, PAX_FOR_ALL = frozenset({b"x", b"X"}), b"g"
WITHOUT_CONTENT = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a fifo"}
"""Whatever size their headers state."""
SPARSE = b"S"
PACKED = (b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""How gzip, xz and Zstandard files begin."""
OCTAL = re.compile(rb"[0-7]*")
PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=]+)=")


class TarFile(NamedTuple):
    """A member of a tar that is no folder."""

    name: str
    """As it is written; bytes that are no UTF-8 appear as `\\xff`."""
    offset: int
    """Bytes from the start of the tar to the content."""
    size: int
    """Bytes."""
    refused: str = ""
    """What it is instead of a plain file, for example `a symbolic link`; empty for one."""


@dataclass(slots=True)
class _Extended:
    """What headers before a member say about it, in place of its own header."""

    name: bytes | None = None
    size: int | None = None


class _Damage(Exception):
    """What is wrong with a header."""


def tar_files(shard: ShardReader) -> Iterator[TarFile]:
    """Yields the members of a tar in order, without its folders; each is known to be whole.

    One that is no plain file is given as such, for it hides nothing of what follows it.

    Raises:
        ValueError: after the files before it, for damage, an end that is cut off, data after the end mark, or a
            sparse file, whose length in the tar its header does not tell.
    """
    at, total = 0, shard.size
    for_all, extended = _Extended(), None
    try:
        if total == 0:
            raise _Damage("it is empty")
        while at < total:
            block = shard.read_range(at, min(BLOCK, total - at))
            if not block.strip(b"\0"):
                _check_tail(shard, at)
                break
            kind, name, size = _parse(block)
            start = at + BLOCK
            if kind in (LONG_NAME, LONG_LINK, PAX_FOR_ALL) or kind in PAX:
                content = _extension(shard, start, size)
                if kind == PAX_FOR_ALL:
                    _read_pax(content, for_all)
                elif kind != LONG_LINK:  # of a link, which is refused
                    extended = extended or _Extended(for_all.name, for_all.size)
                    if kind == LONG_NAME:
                        extended.name = content.partition(b"\0")[0]
                    else:
                        _read_pax(content, extended)
            else:
                known, extended = extended or for_all, None
                name = name if known.name is None else known.name
                size = size if known.size is None else known.size
                text = name.decode("utf-8", "backslashreplace")
                if kind == FOLDER or (kind == b"\0" and name.endswith(b"/")):  # the second of old V7 tars
                    size = 0  # what some writers state is no content
                elif kind in WITHOUT_CONTENT:
                    size = 0
                    yield TarFile(text, start, size, WITHOUT_CONTENT[kind])
                elif kind == SPARSE:
                    raise ValueError(f"{shard}: member {text!r} is a sparse file; only plain files are read")
                elif start + size > total:
                    raise _Damage(f"member {text!r} has {max(0, total - start)} of {size} bytes")
                elif not name or b"\0" in name:
                    raise _Damage(f"member {text!r} has no sane name")
                else:
                    yield TarFile(text, start, size, "" if kind in FILE else f"of type {kind!r}")
            at = start + -(-size // BLOCK) * BLOCK
        if extended is not None:
            raise _Damage("the member that an extended header announces is not there")
    except _Damage as error:
        text = f"{shard} is not a whole tar ({error}, at byte {at} of {total}); build or download it again"
        raise ValueError(text) from None


def _parse(block: bytes) -> tuple[bytes, bytes, int]:
    """Returns the type, name and size in a header block."""
    if len(block) < BLOCK:
        raise _Damage(f"a header has {len(block)} of {BLOCK} bytes")
    if block.startswith(PACKED):  # no name begins so
        raise _Damage("it is compressed: unpack it")
    # The checksum itself counts as eight spaces; some old writers summed signed bytes.
    if _number(block[148:156]) != 256 + sum(block) - sum(block[148:156]):
        signed = sum(memoryview(block).cast("b")) - sum(memoryview(block)[148:156].cast("b")) + 256
        if _number(block[148:156]) != signed:
            raise _Damage("a header's checksum is wrong")
    name = block[:100].partition(b"\0")[0]
    # GNU's header, "ustar  ", has times where POSIX's has the start of a long name.
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return block[156:157], name, _number(block[124:136])


def _number(field: bytes) -> int:
    """Returns the number in a header field: octal digits, or binary if the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if not OCTAL.fullmatch(digits):
        raise _Damage(f"{field!r} in a header is no number")
    return int(digits or b"0", 8)


def _extension(shard: ShardReader, start: int, size: int) -> bytes:
    """Returns the content of a header that extends the next one."""
    if size > MAX_EXTENSION_BYTES:
        raise _Damage(f"an extended header claims {size} bytes (limit {MAX_EXTENSION_BYTES})")
    if start + size > shard.size:
        raise _Damage(f"an extended header has {max(0, shard.size - start)} of {size} bytes")
    return shard.read_range(start, size)


def _read_pax(content: bytes, known: _Extended) -> None:
    """Takes name and size from PAX records: `<bytes of the record> <key>=<value>`, each with a line end."""
    at = 0
    while at < len(content) and content[at]:
        record = PAX_RECORD.match(content, at)
        end = at + int(record[1]) if record else 0
        if record is None or end <= record.end() or content[end - 1 : end] != b"\n":
            raise _Damage("a PAX header is broken")
        key, value = record[2], content[record.end() : end - 1]
        if key == b"path":
            known.name = value
        elif key == b"size":
            if not value.isdigit():
                raise _Damage(f"a PAX header has the size {value!r}")
            known.size = int(value)
        elif key.startswith(b"GNU.sparse."):
            raise _Damage("it holds a sparse file, which is not read")
        at = end


def _check_tail(shard: ShardReader, at: int) -> None:
    """Raises if there is more than zeros after the end mark at byte `at`."""
    tail = shard.read_range(at, min(MAX_TAIL_BYTES, shard.size - at))
    if tail.count(0) != len(tail):
        raise _Damage("data follow the end mark: were tars joined end to end? unpack and pack them anew")
