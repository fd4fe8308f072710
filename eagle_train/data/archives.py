"""Archives of images as data sets are published, read by position: tars and zips, whole or split into parts.

One pass over an archive writes a small table of its members. A tar that is compressed as a whole can only be read
from its start, so it is unpacked into a plain tar first.
"""

from __future__ import annotations

import gzip
import io
import os
import posixpath
import re
import sqlite3
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from eagle_train.data.shards import MAX_MEMBER_BYTES

ARCHIVE = r".+?\.(?:tar|tar\.gz|tgz|zip)"
WHOLE = re.compile(ARCHIVE, re.IGNORECASE)
PART = re.compile(
    rf"(?P<stem>{ARCHIVE})(?:[._-]?part[_-]?(?P<letters>[a-z]{{2,3}})|(?:[._-]?part[_-]?|\.)(?P<digits>\d+))",
    re.IGNORECASE,
)
"""`images.tar.part_aa`, `sam.tar_part12`, `x.tar.gz_part_ab`, `images.zip.001`."""
GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30
COPY_BYTES = 1 << 22

Row = tuple[str, int, int, int]
"""A member: name, offset, bytes in the archive, and whether they are deflated (0 or 1)."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A published archive: its name without part numbers, and its files in order."""

    name: str
    parts: tuple[Path, ...]

    def identity(self) -> str:
        """Returns what tells it from one that was changed or completed since."""
        stats = {part.name: part.stat() for part in self.parts}
        return ";".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats.items())


def find_archives(folder: Path, patterns: Sequence[str]) -> list[Archive]:
    """Returns the archives in a folder, sorted by name; parts are put in order (`part2` before `part10`).

    Args:
        patterns: globs relative to `folder`; files that are not named like archives are passed over.

    Raises:
        ValueError: if a part between two others is missing.
    """
    groups: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        name = path.relative_to(folder).as_posix()
        if part := PART.fullmatch(name):
            groups.setdefault(part["stem"], []).append((_part_number(part["letters"] or part["digits"]), path))
        elif WHOLE.fullmatch(name) and path.is_file():
            groups.setdefault(name, []).append((0, path))
    archives = []
    for name, numbered in sorted(groups.items()):
        numbered.sort()
        numbers = [number for number, _ in numbered]
        if lost := sorted(set(range(numbers[0], numbers[-1])) - set(numbers)):
            near = next(path for number, path in numbered if number > lost[0])
            raise ValueError(f"{folder / name}: {len(lost)} part(s) before {near.name} are missing; download them")
        archives.append(Archive(name, tuple(path for _, path in numbered)))
    return archives


def _part_number(text: str) -> int:
    """Returns the place of a part: `12` is 12, `aa` is 0, `ab` is 1."""
    if text.isdigit():
        return int(text)
    number = 0
    for letter in text.lower():
        number = number * 26 + ord(letter) - ord("a")
    return number


class Joined(io.RawIOBase):
    """The parts of a file as one file, without a copy.

    Args:
        parts: in order.
    """

    def __init__(self, parts: Sequence[Path]) -> None:
        self._files = [path.open("rb", buffering=0) for path in parts]
        self._ends = list(accumulate(path.stat().st_size for path in parts))
        self._at = 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to `offset` bytes from the start, the current place or the end."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._ends[-1]}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        """Reads up to the end of the current part."""
        part = bisect_right(self._ends, self._at)
        if part == len(self._ends):
            return 0
        file = self._files[part]
        file.seek(self._at - (self._ends[part - 1] if part else 0))
        count = file.readinto(buffer)
        self._at += count
        return count

    def close(self) -> None:
        """Closes the parts."""
        for file in self._files:
            file.close()
        super().close()


class ArchiveReader:
    """Reads members of an indexed archive by name; one per process.

    Args:
        archive: what was published.
        folder: where `index_archive` put its table.
    """

    def __init__(self, archive: Archive, folder: Path) -> None:
        self.name = archive.name
        table, plain = _paths(archive, folder)
        # Immutable: no locks, which network file systems may lack.
        self._table = sqlite3.connect(f"{table.absolute().as_uri()}?immutable=1", uri=True)
        self._file = io.BufferedReader(Joined((plain,) if plain.exists() else archive.parts))

    def read(self, name: str) -> bytes | None:
        """Returns the content of a member, or None if there is no such member.

        Raises:
            OSError: if the archive ends before the member does, or its compressed bytes are broken.
        """
        query = "SELECT offset, size, deflated FROM members WHERE name = ?"
        row = self._table.execute(query, (name,)).fetchone()
        if row is None:
            return None
        offset, size, deflated = row
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise OSError(f"{self.name}: member {name} has {len(data)} of {size} bytes")
        try:
            return zlib.decompress(data, wbits=-zlib.MAX_WBITS) if deflated else data
        except zlib.error as error:
            raise OSError(f"{self.name}: member {name} cannot be unpacked: {error}") from error

    def holds(self, name: str) -> bool:
        """Returns whether there is a member of that name."""
        return self._table.execute("SELECT 1 FROM members WHERE name = ?", (name,)).fetchone() is not None

    def close(self) -> None:
        """Closes the files."""
        self._table.close()
        self._file.close()


def index_archive(archive: Archive, folder: Path, progress: Callable[[int], None]) -> tuple[int, str | None]:
    """Writes the table of an archive's members into `folder`, unless it is there and fits.

    Args:
        archive: what was published.
        folder: for the table, and the plain copy of a compressed tar (as large as its content).
        progress: called with the number of members just read.

    Returns:
        The number of members, and what is wrong with the archive if it ends too early; the members before are used.

    Raises:
        ValueError: if it is neither a tar nor a zip.
    """
    table, plain = _paths(archive, folder)
    if table.exists():
        with closing(sqlite3.connect(table)) as known:
            identity, defect = known.execute("SELECT identity, defect FROM archive").fetchone()
            if identity == archive.identity():
                return known.execute("SELECT count(*) FROM members").fetchone()[0], defect
    table.parent.mkdir(parents=True, exist_ok=True)
    for path in (table, plain):
        path.unlink(missing_ok=True)
    with Joined(archive.parts) as file:
        start = file.read(4)
    defect = _gunzip(archive, plain) if start.startswith(GZIP) else None
    members = _zip_members if start.startswith(ZIP) else _tar_members
    aside = table.with_suffix(".partial")
    aside.unlink(missing_ok=True)
    with io.BufferedReader(Joined((plain,) if plain.exists() else archive.parts), COPY_BYTES) as file:
        count, broken = _write_table(aside, archive, members(file, progress), defect)
    aside.replace(table)
    return count, broken


def _paths(archive: Archive, folder: Path) -> tuple[Path, Path]:
    """Returns where the table of an archive is, and where its plain copy is if it needs one."""
    stem = folder / archive.name.replace("/", "__")
    return stem.with_name(f"{stem.name}.members"), stem.with_name(f"{stem.name}.plain")


def _write_table(path: Path, archive: Archive, rows: Iterator[Row], defect: str | None) -> tuple[int, str | None]:
    """Writes the rows; returns their number and the defect, also one that ends them early."""
    # No other process opens this file yet; network file systems may lack locks.
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?nolock=1", uri=True)) as table:
        table.execute("PRAGMA journal_mode = OFF")
        table.execute(
            "CREATE TABLE members (name TEXT PRIMARY KEY, offset INTEGER, size INTEGER, deflated INTEGER) WITHOUT ROWID"
        )
        table.execute("CREATE TABLE archive (identity TEXT, defect TEXT)")
        try:
            # As in unpacking, the last of equal names stays.
            table.executemany("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)", rows)
        except (tarfile.ReadError, EOFError) as error:
            defect = f"it ends early or is broken ({error}); download what is missing"
        count = table.execute("SELECT count(*) FROM members").fetchone()[0]
        if count == 0:
            raise ValueError(f"{archive.parts[0]} holds no files that can be read: {defect or 'it is empty'}")
        table.execute("INSERT INTO archive VALUES (?, ?)", (archive.identity(), defect))
        table.commit()
    return count, defect


def _tar_members(file: io.BufferedReader, progress: Callable[[int], None]) -> Iterator[Row]:
    """Yields the plain files of a tar; links and devices are not images."""
    file.seek(0, os.SEEK_END)
    length = file.tell()
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            progress(1)
            tar.members = []  # it would keep a million of them
            if info.isfile() and info.size <= MAX_MEMBER_BYTES:
                if info.offset_data + info.size > length:
                    raise tarfile.ReadError(f"member {info.name} is cut off")
                yield clean_name(info.name), info.offset_data, info.size, 0


def _zip_members(file: io.BufferedReader, progress: Callable[[int], None]) -> Iterator[Row]:
    """Yields the files of a zip that are stored or deflated, as all usual writers do."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise tarfile.ReadError(str(error)) from error  # its list of members is at its end
    for info in infos:
        progress(1)
        if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and info.file_size <= MAX_MEMBER_BYTES:
            file.seek(info.header_offset)
            # The lengths of name and extra field may differ from those in the list of members.
            name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(LOCAL_HEADER_BYTES))
            offset = info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
            yield clean_name(info.filename), offset, info.compress_size, int(info.compress_type != zipfile.ZIP_STORED)


def _gunzip(archive: Archive, plain: Path) -> str | None:
    """Unpacks a compressed tar; returns what is wrong if it ends early."""
    aside = plain.with_suffix(".partial")
    defect = None
    with (
        io.BufferedReader(Joined(archive.parts), COPY_BYTES) as packed,
        gzip.GzipFile(fileobj=packed) as source,
        aside.open("wb") as target,
    ):
        try:
            while chunk := source.read1(COPY_BYTES):  # unlike `read`, it gives what is before a defect
                target.write(chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            defect = f"it ends early or is broken ({error}); download what is missing"
    aside.replace(plain)
    return defect


def clean_name(name: str) -> str:
    """Returns a path inside an archive or an annotation in its one spelling: `./a//b.jpg` is `a/b.jpg`."""
    return posixpath.normpath(name.replace("\\", "/")).lstrip("/")
