"""Finds the media that records name, in archives and in a folder."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from eagle_train.data.archives import Archive, ArchiveReader, clean_name
from eagle_train.data.media_files import read_media_file
from eagle_train.data.media_sources import ADDRESS, is_address, read_address
from eagle_train.data.placeholders import MediaRef
from eagle_train.types import SampleError


class OpenMedia(Protocol):
    """Opened places of media."""

    def read(self, ref: MediaRef, key: str) -> bytes:
        """Returns the bytes of a medium of sample `key`; raises SampleError."""

    def close(self) -> None:
        """Lets go of what is open."""


class Places(Protocol):
    """Where media may be; each process opens them for itself."""

    def open(self) -> OpenMedia:
        """Opens what there is to open."""


@dataclass(frozen=True, slots=True)
class MediaFolder:
    """A folder that records name files in, see `read_media_file`."""

    folder: Path

    def open(self) -> MediaFolder:
        """Returns itself: files are opened one by one."""
        return self

    def read(self, ref: MediaRef, key: str) -> bytes:
        """Returns the bytes of a file of sample `key`; raises SampleError."""
        return read_media_file(ref, self.folder, key)

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class MediaPlaces:
    """A download: records name files in archives and folders, from several roots.

    Args:
        folder: of the download.
        roots: folders that the records' paths may start from, below `folder` and in archives.
        archives: already indexed.
        tables: folder of their indexes.
    """

    folder: Path
    roots: tuple[str, ...]
    archives: tuple[Archive, ...]
    tables: Path

    def open(self) -> MediaStore:
        """Opens the archives."""
        return MediaStore(self)


class MediaStore:
    """Reads media by the path that a record gives; archives are asked before the folder, which may be slow.

    Args:
        places: where they are.
    """

    def __init__(self, places: MediaPlaces) -> None:
        self._places = places
        self._archives = [ArchiveReader(archive, places.tables) for archive in places.archives]

    def read(self, ref: MediaRef, key: str) -> bytes:
        """Returns the bytes of a medium of sample `key`.

        Raises:
            SampleError: if it is nowhere, or cannot be read.
        """
        if is_address(ref.ref):
            return read_address(ref, key)
        names = self._names(ref.ref)
        if ADDRESS.match(ref.ref) or any(name.startswith("../") for name in names):
            raise SampleError(key, "bad_record", f"{ref.ref[:200]!r} is no path inside the download")
        try:
            for archive in self._archives:
                for name in names:
                    if (data := archive.read(name)) is not None:
                        return data
        except OSError as error:
            raise SampleError(key, f"unreadable_{ref.kind}", str(error)) from error
        for name in names:
            if _is_file(self._places.folder / name):
                return read_media_file(MediaRef(ref.kind, name), self._places.folder, key)
        looked = [archive.name for archive in self._archives]
        raise SampleError(key, "missing_media", f"{ref.ref!r} is neither in {self._places.folder} nor in {looked}")

    def holds(self, path: str) -> bool:
        """Returns whether a medium is there."""
        names = self._names(path)
        return any(archive.holds(name) for archive in self._archives for name in names) or any(
            _is_file(self._places.folder / name) for name in names
        )

    def close(self) -> None:
        """Closes the archives."""
        for archive in self._archives:
            archive.close()

    def _names(self, path: str) -> Sequence[str]:
        """Returns the spellings under which a record's path is looked for."""
        return [posixpath.normpath(posixpath.join(root, clean_name(path))) for root in self._places.roots]


def _is_file(path: Path) -> bool:
    """Returns whether there is such a file; no name is too long or too odd for an answer."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
