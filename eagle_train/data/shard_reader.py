"""Reading the members of one shard, wherever it is."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from eagle_train.data.byte_ranges import RangeFile, ReadAhead
from eagle_train.data.locations import Location, shown

ENDS_BYTES = 1 << 16
MAX_JOINED_BYTES = 1 << 26
"""Largest range that several members are read in: they are in memory twice while it is taken apart."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample inside a tar."""

    name: str
    """Extension after the sample's key, for example `json` or `0.png`."""
    offset: int
    """Bytes from the start of the tar to the first byte of the content."""
    size: int
    """Bytes."""
    refused: str = ""
    """Why it may not be read, if so; an index keeps that as what is wrong with the sample."""


class MemberFile(io.RawIOBase):
    """One member of a shard as a file; closing it leaves the shard open.

    Args:
        file: the shard's bytes.
        member: where in them.
    """

    def __init__(self, file: RangeFile, member: Member) -> None:
        self._file = file
        self._member = member
        self._at = 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a byte, see `io.IOBase`; returns which."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._member.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        """Fills `buffer` as far as there are bytes; returns how many."""
        count = max(0, min(len(buffer), self._member.size - self._at))
        buffer[:count] = self._file.read_range(self._member.offset + self._at, count) if count else b""
        self._at += count
        return count


class ShardReader:
    """Reads members of one shard by byte range; picklable, and safe to share between threads and forks.

    Args:
        file: the shard's bytes, see `storage.open_shard`.
    """

    def __init__(self, file: RangeFile) -> None:
        self._file = file

    @property
    def location(self) -> Location:
        """Where the shard is."""
        return self._file.location

    @property
    def size(self) -> int:
        """Bytes of the shard; a remote one is asked once."""
        return self._file.size()

    def read(self, member: Member) -> bytes:
        """Returns the content of `member`.

        Raises:
            OSError: if the shard ends before the member does, or cannot be read.
        """
        return self._file.read_range(member.offset, member.size)

    def read_range(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, see `read`."""
        return self._file.read_range(offset, size)

    def open(self, member: Member) -> BinaryIO:
        """Returns `member` as a seekable file, of which what is asked for is read, and a little more."""
        return io.BufferedReader(MemberFile(self._file, member), buffer_size=self._file.gap_bytes)

    def read_members(self, members: Sequence[Member]) -> list[bytes]:
        """Returns the contents of `members` in their order; those that stand close together are read at once."""
        contents: dict[Member, bytes] = {}
        for group in self._groups(members):
            start = group[0].offset
            size = max(member.offset + member.size for member in group) - start
            data = self._file.read_range(start, size)
            for member in group:
                at = member.offset - start
                contents[member] = data[at : at + member.size]
        return [contents[member] for member in members]

    def identity(self) -> str:
        """Returns what tells the shard from a rebuilt one: its size, and a hash of both ends or the storage's checksum.

        Where the storage has a version but no checksum, a time for example, it is there as well.
        """
        size = self._file.size()
        if self._file.has_checksum():
            return f"{size}-{self._file.version()}"
        ends_bytes = min(size, ENDS_BYTES)
        digest = hashlib.sha256(self._file.read_range(0, ends_bytes))
        digest.update(self._file.read_range(size - ends_bytes, ends_bytes))
        version = self._file.version()
        return f"{size}-{digest.hexdigest()[:16]}" + (f"-{version}" if version else "")

    def read_ahead(self) -> ShardReader:
        """Returns a reader of the same shard for a pass from its start to its end, in few large requests."""
        return self if isinstance(self._file, ReadAhead) else ShardReader(ReadAhead(self._file))

    def close(self) -> None:
        """Lets go of what is open; a later read opens it again."""
        self._file.close()

    def _groups(self, members: Sequence[Member]) -> list[list[Member]]:
        """Returns the members by place, in groups that one request each reads."""
        groups: list[list[Member]] = []
        start = end = 0
        for member in sorted(members, key=lambda m: m.offset):
            last = member.offset + member.size
            if groups and member.offset - end <= self._file.gap_bytes and last - start <= MAX_JOINED_BYTES:
                groups[-1].append(member)
                end = max(end, last)
            else:
                groups.append([member])
                start, end = member.offset, last
        return groups

    def __str__(self) -> str:
        return shown(self.location)
