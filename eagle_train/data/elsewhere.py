"""The files of a sample's media: members of its shard, and what its record holds or names elsewhere.

A record may hold a picture itself (`data:`), name it on the web, or by a path. The index reads each such file once, for
its header facts, and keeps its size and a hash of its ends: when the sample is read, a file that is another one by then
is an error, so that what was planned is what is encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from eagle_train.data.byte_ranges import HeldFile, LocalFile
from eagle_train.data.locations import shown
from eagle_train.data.media_files import find_media_file
from eagle_train.data.media_sources import WEB, fetch_medium, is_address, named, read_address
from eagle_train.data.placeholders import MediaRef
from eagle_train.data.retries import Retries, StorageError
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.types import Media, SampleError


@dataclass(frozen=True, slots=True)
class Outside:
    """What the index knows of a file that is no member of its shard."""

    name: str
    """`record/3`: file 3 of the record, in reading order. No member has a slash in its name."""
    size: int
    """Bytes."""
    identity: str
    """Of the content, see `ShardReader.identity`."""


@dataclass(frozen=True)
class Elsewhere:
    """Where the files may be that the records of a source name beside the members of its shards.

    Args:
        media_root: folder that paths and `file://` addresses start from and may not lead out of. None: a record may
            name no file of this machine, for whoever made the shard could read any.
        retries: of a web server, and of a network file system.
    """

    media_root: Path | None = None
    retries: Retries = field(default_factory=Retries)

    def may_hold(self, path: str) -> bool:
        """Returns whether what a record names is looked for here."""
        return is_address(path) or self.media_root is not None

    def open(self, ref: MediaRef, key: str) -> tuple[ShardReader, str]:
        """Returns the bytes of a file that a record names, and their identity, see `ShardReader.identity`.

        What the web or the record holds is in memory then.

        Args:
            key: names the sample in errors.

        Raises:
            SampleError: for a file that is not there, lies elsewhere, is too large, or a protocol that is not read.
            StorageError: if a web server or a network file system does not answer.
        """
        found = self._find(ref, key)
        try:
            return found, found.identity()
        except StorageError:
            raise
        except OSError as error:  # of a file on this machine
            raise SampleError(key, "missing_media", f"{named(ref.ref)}: {error}") from error

    def _find(self, ref: MediaRef, key: str) -> ShardReader:
        """Returns what `open` does; a file on this machine is not opened yet."""
        if ref.ref.startswith(WEB):
            return ShardReader(HeldFile(fetch_medium(ref, key, self.retries), shown(ref.ref)))
        if is_address(ref.ref):
            return ShardReader(HeldFile(read_address(ref, key), named(ref.ref)))
        if self.media_root is None:
            detail = f"{named(ref.ref)} is a file of this machine; set media_root in the dataset card to allow it"
            raise SampleError(key, "bad_record", detail)
        return ShardReader(LocalFile(find_media_file(ref, self.media_root, key), self.retries))


@dataclass(frozen=True, slots=True)
class MediaFile:
    """One file of a medium, as bytes within what a reader reads."""

    reader: ShardReader
    member: Member

    @property
    def name(self) -> str:
        """As in errors, and in `types.Media`."""
        return self.member.name

    @property
    def size(self) -> int:
        """Bytes."""
        return self.member.size

    def read(self) -> bytes:
        """Returns all of it; raises OSError if it cannot be read."""
        return self.reader.read(self.member)

    def head(self, size: int) -> bytes:
        """Returns its first `size` bytes, which it must have."""
        return self.reader.read_range(self.member.offset, size)

    def open(self) -> BinaryIO:
        """Returns it as a seekable file, of which only what is asked for is read."""
        return self.reader.open(self.member)


def read_all(files: Iterable[MediaFile]) -> dict[MediaFile, bytes]:
    """Returns the contents of files; members that stand close together are read at once."""
    by_reader: dict[ShardReader, list[MediaFile]] = {}
    for file in files:
        by_reader.setdefault(file.reader, []).append(file)
    contents: dict[MediaFile, bytes] = {}
    for reader, mine in by_reader.items():
        contents |= zip(mine, reader.read_members([file.member for file in mine]), strict=True)
    return contents


def find_files(
    reader: ShardReader, key: str, members: Sequence[Member], media: Sequence[MediaRef], elsewhere: Elsewhere
) -> tuple[list[list[MediaFile]], list[Outside]]:
    """Returns the files of each medium of a record, for its index, and what is to be known of those outside.

    Args:
        reader, members: of the sample.
        media: of its record.

    Raises:
        SampleError, StorageError: see `Elsewhere.open`.
    """
    by_name = {member.name: member for member in members}
    files, outside, number = [], [], 0
    for ref in media:
        mine = []
        for file in ref.files:
            if file.ref in by_name:
                mine.append(MediaFile(reader, by_name[file.ref]))
            else:
                found, identity = elsewhere.open(file, key)
                outside.append(Outside(f"record/{number}", found.size, identity))
                mine.append(MediaFile(found, Member(f"record/{number}", 0, found.size)))
            number += 1
        files.append(mine)
    return files, outside


class SampleFiles(Mapping[str, MediaFile]):
    """The files of a sample's media by the names that its index has for them; those outside are opened when asked for.

    Args:
        reader: of its shard.
        key: names the sample in errors.
        row: of the index, see `index.SCHEMA`.
        media: of its record, in the order of the row's.
        elsewhere: where the files are that are no members.
    """

    def __init__(
        self, reader: ShardReader, key: str, row: Mapping, media: Sequence[MediaRef], elsewhere: Elsewhere
    ) -> None:
        self._reader, self._key, self._elsewhere = reader, key, elsewhere
        self._members = {member["name"]: Member(**member) for member in row["members"]}
        self._outside = {each["name"]: Outside(**each) for each in row["outside"]}
        self._refs: dict[str, MediaRef] = {}
        if self._outside:
            names = [name for medium in row["media"] for name in medium["members"] or [medium["member"]]]
            self._refs = dict(zip(names, (file for ref in media for file in ref.files), strict=True))

    def __getitem__(self, name: str) -> MediaFile:
        """Returns a file; raises SampleError if it is not what the index saw, and as `Elsewhere.open`."""
        known = self._outside.get(name)
        if known is None:
            return MediaFile(self._reader, self._members[name])
        ref = self._refs[name]
        found, now = self._elsewhere.open(ref, self._key)
        if now != known.identity:
            detail = f"{named(ref.ref)} is not what the index saw ({known.identity}, now {now})"
            raise SampleError(self._key, "changed_media", f"{detail}; restore it, or delete the index of the shard")
        return MediaFile(found, Member(name, 0, found.size))

    def __iter__(self) -> Iterator[str]:
        return iter([*self._members, *self._outside])

    def __len__(self) -> int:
        return len(self._members) + len(self._outside)

    def size(self, media: Media) -> int:
        """Returns the bytes of all files of a medium, as the index knows them; nothing is opened."""
        known = {**self._members, **self._outside}
        return sum(known[name].size for name in media.members or [media.member])
