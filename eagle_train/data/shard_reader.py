"""Reading the members of one shard, wherever it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

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
        """Returns what tells the shard from a rebuilt one: its size, a hash of both ends, and its version if remote."""
        size = self._file.size()
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
