"""Files that are read by byte range: the common type, a local file, bytes, and reading ahead for a pass over a file."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections import deque
from pathlib import Path

from eagle_train.data.locations import Location
from eagle_train.data.retries import Retries, StorageError

PASSING = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ECONNRESET,
        errno.EREMOTEIO,
        errno.EAGAIN,
    }
)
"""What a network file system answers for a while when a server restarts, a client was cut off or a file was renamed."""
NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""What is said of a path that leads to no file. Other errors (no right, no descriptor left) are not about the file."""
LOCAL_GAP_BYTES = 1 << 15
MAX_READ_BYTES = 1 << 30
"""One Linux `pread` returns at most 2 GiB - 4 KiB."""


class RangeFile(ABC):
    """A file whose bytes are read by offset; picklable, and safe to share between threads and forks."""

    location: Location
    gap_bytes: int
    """Reading this much in vain costs less than another request."""

    @abstractmethod
    def size(self) -> int:
        """Returns the number of bytes."""

    @abstractmethod
    def version(self) -> str:
        """Returns what the storage says to tell this content from another of that name; may be empty."""

    def has_checksum(self) -> bool:
        """Returns whether `version` is of a checksum or the like: another with every other content."""
        return False

    @abstractmethod
    def read_range(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`.

        Raises:
            OSError: if the file ends before, or cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets go of what is open; a later read opens it again."""


class LocalFile(RangeFile):
    """A file on a local or network file system. It is opened again where a network file system lost it.

    Args:
        path: of the file.
        retries: for errors of `PASSING`.
    """

    gap_bytes = LOCAL_GAP_BYTES

    def __init__(self, path: Path, retries: Retries) -> None:
        self.location = path
        self._retries = retries
        self._open: _Descriptor | None = None

    def __reduce__(self):
        return type(self), (self.location, self._retries)

    def size(self) -> int:
        """Returns the number of bytes the file had when it was opened."""
        return self._run(lambda file: file.size)

    def version(self) -> str:
        """Returns nothing: copies of a file are equal, whatever their times."""
        return ""

    def read_range(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, see `RangeFile`."""
        return self._run(lambda file: file.read(offset, size))

    def close(self) -> None:
        """Closes the file as soon as no thread reads it."""
        self._open = None

    def _run(self, action):
        """Returns `action(open file)`, opening the file again after an error that may pass."""

        def attempt():
            # A reference of its own: another thread may let go of the file meanwhile.
            file = self._open
            if file is None:
                file = self._open = _Descriptor(self.location)
            try:
                return action(file)
            except OSError:
                self._open = None
                raise

        def is_passing(error: Exception) -> bool:
            return isinstance(error, OSError) and error.errno in PASSING

        try:
            return self._retries.run(attempt, is_passing, self.location)
        except StorageError:
            raise
        except OSError as error:
            if error.errno is None or error.errno in NOT_THERE:
                raise
            raise StorageError(
                f"{self.location}: {error}; make it readable for this process, and start again"
            ) from error


class _Descriptor:
    """An open file, closed with the last reference to it: never while another thread reads from it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._number).st_size

    def __del__(self) -> None:
        if "_number" in self.__dict__:  # not if it could not be opened
            os.close(self._number)

    def read(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes; what a read falls short of is read by the next."""
        data = os.pread(self._number, min(size, MAX_READ_BYTES), offset)
        if len(data) == size:
            return data
        parts, count = [data], len(data)
        while count < size and data:
            data = os.pread(self._number, min(size - count, MAX_READ_BYTES), offset + count)
            parts.append(data)
            count += len(data)
        if count < size:
            raise OSError(f"{self._path} has {count} of {size} bytes from {offset} on: it was cut; restore it")
        return b"".join(parts)


class HeldFile(RangeFile):
    """Bytes in memory as a file.

    Args:
        data: the bytes.
        location: where they are from, for messages.
    """

    gap_bytes = 0

    def __init__(self, data: bytes, location: Location) -> None:
        self.location = location
        self._data = data

    def size(self) -> int:
        """Returns the number of bytes."""
        return len(self._data)

    def version(self) -> str:
        """Returns nothing: equal bytes are equal."""
        return ""

    def read_range(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, see `RangeFile`."""
        data = self._data[offset : offset + size]
        if len(data) < size:
            raise OSError(f"{self.location} has {len(data)} of {size} bytes from {offset} on")
        return data

    def close(self) -> None:
        """The bytes stay."""


class ReadAhead(RangeFile):
    """A file read from its start to its end, in few large requests; not for several threads.

    Forward reads fetch a window that doubles while they stay close to each other, so a header per image costs
    a request per 16 MiB of a remote shard, and one per header where members are films. The last two windows stay:
    what a sample consists of is read after the header that ends it.

    Args:
        file: what is read; closing this does not close it.
    """

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self.location = file.location
        self.gap_bytes = file.gap_bytes
        self._window_bytes = file.gap_bytes
        self._windows: deque[tuple[int, bytes]] = deque(maxlen=2)
        self._size: int | None = None

    def __reduce__(self):
        return type(self), (self._file,)

    def size(self) -> int:
        """Returns the number of bytes, asked for once."""
        if self._size is None:
            self._size = self._file.size()
        return self._size

    def version(self) -> str:
        """Returns that of the file."""
        return self._file.version()

    def has_checksum(self) -> bool:
        """Returns whether the file has one."""
        return self._file.has_checksum()

    def read_range(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, see `RangeFile`."""
        for start, window in reversed(self._windows):
            at = offset - start
            if at >= 0 and at + size <= len(window):
                return window[at : at + size]
        start, window = self._windows[-1] if self._windows else (0, b"")
        if offset < start or size > 16 * self.gap_bytes:
            return self._file.read_range(offset, size)
        is_near = offset <= start + len(window) + self.gap_bytes
        self._window_bytes = min(2 * self._window_bytes, 16 * self.gap_bytes) if is_near else self.gap_bytes
        count = max(size, min(self._window_bytes, self.size() - offset))
        window = self._file.read_range(offset, count)
        self._windows.append((offset, window))
        return window[:size]

    def close(self) -> None:
        """Lets go of the windows."""
        self._windows.clear()
