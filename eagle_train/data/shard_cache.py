"""Whole shards from URLs, kept on a node's own disk and shared by all its processes.

The first to read a shard downloads it; others wait a little, then read ranges over the network until it is there.
A download is written aside and renamed when it is whole, so what has the final name is whole. Every trouble with the
disk costs speed only: the shard is read over the network then.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from eagle_train.data.byte_ranges import LocalFile, RangeFile
from eagle_train.data.locations import file_name, shown
from eagle_train.data.retries import Retries, StorageError

log = logging.getLogger(__name__)

WHOLE, PARTIAL, LOCK = ".cached", ".partial", ".lock"
"""How the cache's files end; it touches no others in its folder."""
DOWNLOAD_BYTES = 1 << 25
POLL_SECONDS = 0.05
TOUCH_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class ShardCache:
    """A folder of whole shards; the one used longest ago goes first when a new one needs the place.

    Args:
        folder: on a disk of the node, for example `/local/scratch/shards`; made if needed.
        max_bytes: of all files in it; a larger shard is never kept.
        wait_seconds: how long a reader waits for a download by another process before it reads over the network.
        stale_seconds: a download that wrote nothing for so long is taken for dead.
    """

    folder: str
    max_bytes: int
    wait_seconds: float = 5.0
    stale_seconds: float = 300.0
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_bytes <= 0 or self.wait_seconds < 0 or self.stale_seconds <= 0:
            values = f"max_bytes={self.max_bytes}, wait_seconds={self.wait_seconds}, stale_seconds={self.stale_seconds}"
            raise ValueError(f"data.storage.cache: {values}; max_bytes and stale_seconds are more than 0")

    def place(self, file: RangeFile) -> Path:
        """Returns where a file is or would be kept; another version of it has another place."""
        digest = hashlib.sha256(f"{file.location}\0{file.size()}\0{file.version()}".encode()).hexdigest()
        return Path(self.folder) / f"{digest[:24]}-{file_name(file.location)[-100:]}{WHOLE}"

    def find(self, place: Path, size: int) -> bool:
        """Returns whether the whole file is there, and notes that it is used now."""
        try:
            if place.stat().st_size != size:
                place.unlink()  # not ours: a rename publishes whole files only
                return False
        except FileNotFoundError:
            return False
        with suppress(OSError):  # removed meanwhile, or another user's
            os.utime(place)
        return True

    def fetch(self, file: RangeFile, place: Path, wait_seconds: float) -> bool:
        """Returns whether `file` is at `place`, downloading it unless another process does and needs longer.

        Raises:
            OSError: if it cannot be kept: no room, or the folder cannot be written.
        """
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_seconds
        while not self.find(place, file.size()):
            with self._lock(place) as lock:
                if lock is not None:
                    return self.find(place, file.size()) or self._download(file, place, lock)
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def warn(self, error: OSError) -> None:
        """Says once per process that the cache cannot be used."""
        if not self._told:
            self._told.add(self.folder)
            text = "a shard cannot be kept in data.storage.cache.folder %s (%s); shards are read over the network"
            log.warning(text, self.folder, error)

    @contextmanager
    def _lock(self, place: Path) -> Iterator[Path | None]:
        """Holds the right to download; gives None if another process has it and is alive."""
        lock = place.with_name(place.name + LOCK)
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            with suppress(FileNotFoundError):
                if self._is_stale(lock):
                    # Two may break it and both download: a waste, but each writes aside and renames what is whole.
                    lock.unlink()
            yield None
            return
        try:
            yield lock
        finally:
            lock.unlink(missing_ok=True)

    def _is_stale(self, path: Path) -> bool:
        return time.time() - path.stat().st_mtime > self.stale_seconds

    def _download(self, file: RangeFile, place: Path, lock: Path) -> bool:
        """Returns True when `file` is at `place`; see `fetch`."""
        size = file.size()
        aside = place.with_name(f"{place.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
        try:
            with aside.open("wb") as target:
                target.truncate(size)  # so that others count it in full from now on
                self._make_room(aside, size)
                for offset in range(0, size, DOWNLOAD_BYTES):
                    target.write(file.read_range(offset, min(DOWNLOAD_BYTES, size - offset)))
                    target.flush()
                    with suppress(FileNotFoundError):  # broken: it took too long
                        os.utime(lock)
                os.fsync(target.fileno())  # a crash of the node must not leave the name with other bytes
            file.close()  # forgets what the storage said about it
            if self.place(file) != place:
                raise OSError(f"{shown(file.location)} was written again while it was downloaded")
            aside.replace(place)
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _make_room(self, aside: Path, size: int) -> None:
        """Removes what was used longest ago until the file that `aside` will be has place.

        A reader of a removed file keeps its bytes: Linux frees them when the last reader closes it.
        """
        whole, total = [], 0
        for path in Path(self.folder).iterdir():
            with suppress(FileNotFoundError):  # gone meanwhile
                stat = path.stat()
                if path.suffix in (PARTIAL, LOCK) and path != aside and self._is_stale(path):
                    path.unlink()  # of a killed process
                elif path.suffix in (WHOLE, PARTIAL):
                    total += stat.st_size
                    if path.suffix == WHOLE:
                        whole.append((stat.st_mtime, stat.st_size, path))
        # What cannot fit must not push others out.
        if total - sum(size for _, size, _ in whole) > self.max_bytes:
            raise OSError(f"max_bytes={self.max_bytes} has no room for {size} bytes beside other downloads; raise it")
        for _, freed, path in sorted(whole):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= freed
        if (free := shutil.disk_usage(self.folder).free) < size:
            raise OSError(f"the disk has {free} bytes left, the shard {size}")


class CachedFile(RangeFile):
    """A file at a URL, read from the cache as soon as it is there.

    Args:
        remote: the file.
        cache: of this node.
    """

    def __init__(self, remote: RangeFile, cache: ShardCache) -> None:
        self._remote = remote
        self._cache = cache
        self._kept: tuple[Path, LocalFile] | None = None
        self._has_waited = self._is_refused = False
        self._touched = 0.0
        self.location = remote.location
        self.gap_bytes = remote.gap_bytes

    def __reduce__(self):
        return type(self), (self._remote, self._cache)

    def size(self) -> int:
        """Returns the number of bytes."""
        return self._remote.size()

    def version(self) -> str:
        """Returns that of the file at its URL."""
        return self._remote.version()

    def has_checksum(self) -> bool:
        """Returns whether the file at its URL has one."""
        return self._remote.has_checksum()

    def read_range(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, see `RangeFile`."""
        kept = self._find()
        if kept is not None:
            try:
                return kept.read_range(offset, size)
            except OSError as error:
                if offset + size > self.size():
                    raise  # the shard itself is cut
                self._refuse(error)
        return self._remote.read_range(offset, size)

    def close(self) -> None:
        """Closes the files; a later read looks for the kept one again."""
        self._remote.close()
        self._kept = None
        self._has_waited = self._is_refused = False

    def _find(self) -> LocalFile | None:
        """Returns the kept file, downloading it if nobody did; None while it is not there."""
        if self._is_refused:
            return None
        if self._kept is not None:
            if time.monotonic() - self._touched > TOUCH_SECONDS:
                self._touched = time.monotonic()
                with suppress(OSError):  # removed; its bytes stay while it is open
                    os.utime(self._kept[0])
            return self._kept[1]
        place, size = self._cache.place(self._remote), self.size()
        wait_seconds = 0.0 if self._has_waited else self._cache.wait_seconds
        self._has_waited = True
        try:
            local = LocalFile(place, Retries(attempts=1))
            if self._cache.fetch(self._remote, place, wait_seconds) and local.size() == size:
                self._kept, self._touched = (place, local), time.monotonic()
                return local
        except StorageError:
            raise  # of the network, not of the disk
        except FileNotFoundError:
            pass  # removed before it was opened
        except OSError as error:
            self._refuse(error)
        return None

    def _refuse(self, error: OSError) -> None:
        """Reads over the network from now on."""
        self._cache.warn(error)
        self._kept = None
        self._is_refused = True
