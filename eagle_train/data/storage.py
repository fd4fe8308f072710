"""Shards anywhere: local and network file systems, object stores and web servers, behind one reader.

Whatever is no path is read through `fsspec`; keys and endpoints come from its configuration and from the
environment (`AWS_ENDPOINT_URL`, `FSSPEC_S3`, `GOOGLE_APPLICATION_CREDENTIALS`), so they are in no recipe.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from eagle_train.data.byte_ranges import LocalFile, RangeFile
from eagle_train.data.locations import Location, as_location, expand_braces, protocol_of, redacted, shown
from eagle_train.data.retries import Retries, StorageError
from eagle_train.data.shard_cache import CachedFile, ShardCache
from eagle_train.data.shard_reader import ShardReader

T = TypeVar("T")
REMOTE_GAP_BYTES = 1 << 20
"""10 to 30 ms of a request at 50 MB/s: what object stores give one connection."""
REQUEST_BYTES = 1 << 25
"""What `timeout_seconds` is for; a larger request may take longer in proportion."""
CHECKSUMS = ("ETag", "etag", "md5Hash", "generation")
TIMES = ("LastModified", "Last-Modified", "mtime", "updated", "created")
"""Facts that storages give about a file; the first of both that is there is its version."""
BUGS = (TypeError, AttributeError, NameError, KeyError, IndexError, AssertionError, ImportError, MemoryError)
"""Errors that come back every time."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How shards are read.

    Args:
        attempts, backoff_seconds: see `Retries`.
        timeout_seconds: for a request of up to 32 MiB to a URL.
        cache: where whole shards from URLs are kept on this node; null: they are read by range.
    """

    attempts: int = 6
    backoff_seconds: float = 0.5
    timeout_seconds: float = 60.0
    cache: ShardCache | None = None

    def __post_init__(self) -> None:
        self.retries()
        if self.timeout_seconds <= 0:
            raise ValueError(f"data.storage.timeout_seconds is {self.timeout_seconds}; it must be more than 0")

    def retries(self) -> Retries:
        """Returns how often a request is made."""
        return Retries(attempts=self.attempts, backoff_seconds=self.backoff_seconds)


def open_shard(location: Location, storage: Storage | None = None) -> ShardReader:
    """Returns a reader of the shard at a path or URL; nothing is opened before the first read.

    Raises:
        ValueError: for a protocol that is not read, or whose package is not installed.
    """
    return ShardReader(open_file(location, storage or Storage()))


def open_file(location: Location, storage: Storage) -> RangeFile:
    """Returns the bytes at a location, see `open_shard`."""
    location = as_location(location)
    if isinstance(location, Path):
        return LocalFile(location, storage.retries())
    remote = RemoteFile(location, storage)
    return remote if storage.cache is None else CachedFile(remote, storage.cache)


def exists(location: Location, storage: Storage | None = None) -> bool:
    """Returns whether there is a file; a storage that does not answer is a StorageError, not an absent file."""
    location = as_location(location)
    if isinstance(location, Path):
        return location.is_file()
    try:
        return RemoteFile(location, storage or Storage()).size() >= 0
    except FileNotFoundError:
        return False


def glob(pattern: Location, storage: Storage | None = None) -> list[Location]:
    """Returns what a pattern names, sorted: `*`, `?` and `[...]` are looked up, `{000..012}` is written out.

    A local name without wildcards is looked up too; a URL without wildcards is returned as it is, for not every
    server can tell. `?` is no wildcard in `http` URLs.
    """
    found: set[Location] = set()
    for text in expand_braces(str(as_location(pattern))):
        location = as_location(text)
        if isinstance(location, Path):
            found.update(Path(location.anchor).glob(str(location.relative_to(location.anchor))))
        elif any(sign in location for sign in ("*[" if location.startswith("http") else "*?[")):
            protocol = protocol_of(location)
            names = RemoteFile(location, storage or Storage()).request(lambda fs, path, **kw: fs.glob(path, **kw))
            found.update(name if "://" in name else f"{protocol}://{name.lstrip('/')}" for name in names)
        else:
            found.add(location)
    return sorted(found)


class RemoteFile(RangeFile):
    """A file at a URL. Each process makes its own connections, at its first read.

    Args:
        url: see `locations`.
        storage: attempts and time limits.
    """

    gap_bytes = REMOTE_GAP_BYTES

    def __init__(self, url: str, storage: Storage) -> None:
        self.location = url
        self._storage = storage
        self._retries = storage.retries()
        self._info: dict[str, Any] | None = None
        self._system: tuple[int, fsspec.AbstractFileSystem] | None = None

    def __reduce__(self):
        return type(self), (self.location, self._storage)

    def size(self) -> int:
        """Returns the number of bytes, asked for once."""
        return self.info()["size"]

    def version(self) -> str:
        """Returns a short hash of what the storage says about the content: a checksum if it has one, or a time."""
        info = self.info()
        facts = next((f"{name}={info[name]}" for name in (*CHECKSUMS, *TIMES) if info.get(name)), "")
        return hashlib.sha256(facts.encode()).hexdigest()[:12] if facts else ""

    def has_checksum(self) -> bool:
        """Returns whether the version is a checksum; a weak one of the web (RFC 9110, 8.8.1) is none."""
        first = next((str(self.info()[name]) for name in CHECKSUMS if self.info().get(name)), "")
        return bool(first) and not first.startswith("W/")

    def info(self) -> dict[str, Any]:
        """Returns what the storage says about the file, asked for once; `size` is always there.

        Raises:
            ValueError: if it does not say how large the file is.
        """
        if self._info is None:
            info = self.request(lambda fs, path, **kwargs: fs.info(path, **kwargs))
            if info.get("type", "file") != "file":
                raise FileNotFoundError(f"{shown(self.location)} is a folder, not a file")
            if info.get("size") is None:
                raise ValueError(f"{shown(self.location)}: the server does not tell its size; download it")
            self._info = info
        return self._info

    def read_range(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, see `RangeFile`."""
        if size == 0:
            return b""

        def read(fs, path, **kwargs) -> bytes:
            data = fs.cat_file(path, start=offset, end=offset + size, **kwargs)
            if len(data) > size:
                remedy = "this server does not serve byte ranges; download the shard, or use another server"
                raise ValueError(f"{shown(self.location)}: asked for {size} bytes, got {len(data)}: {remedy}")
            if len(data) < size and offset + size <= self.size():
                raise ConnectionError(f"the answer has {len(data)} of {size} bytes from {offset} on")
            return data

        # The size is asked for only where an answer is short: most reads are fine, and a question costs a request.
        try:
            if self._info is None or offset + size <= self.size():
                data = self.request(read, 1 + size / REQUEST_BYTES)
                if len(data) == size:
                    return data
        except _PastEnd as error:
            if offset + size <= self.size():
                raise StorageError(f"{shown(self.location)}: {error}") from error
        has = max(0, self.size() - offset)
        raise OSError(f"{shown(self.location)} has {has} of {size} bytes from {offset} on: it was cut; restore it")

    def request(self, action: Callable[..., T], times: float = 1.0) -> T:
        """Returns `action(file system, path, **time limit)`, tried as often as the settings say.

        Args:
            times: part of the time limit that the request may take.

        Raises:
            FileNotFoundError, PermissionError: at once.
            StorageError: if every attempt failed.
            ValueError: if a package is missing.
        """

        def attempt() -> T:
            system = self.system()
            limit = {"timeout": times * self._storage.timeout_seconds} if system.async_impl else {}
            try:
                # The protocol is stripped, so a chain of locations in the URL is never followed.
                return action(system, system._strip_protocol(self.location), **limit)
            except Exception as error:
                known = translated(error, self.location)
                if known is error:
                    raise
                raise known from error

        return self._retries.run(attempt, is_passing, self.location)

    def system(self) -> fsspec.AbstractFileSystem:
        """Returns this process's file system: its threads and sockets would not survive a fork."""
        if self._system is None or self._system[0] != os.getpid():
            protocol = protocol_of(self.location)
            try:
                # Listings are not kept: a shard that was written again must be seen.
                system = fsspec.filesystem(protocol, use_listings_cache=False)
            except ImportError as error:
                text = f"{shown(self.location)}: a package to read {protocol}:// is missing ({error})"
                raise ValueError(f"{text}; run `pip install eagle-train[remote]`") from error
            self._system = os.getpid(), system
        return self._system[1]

    def close(self) -> None:
        """Forgets the connections, which `fsspec` shares between files, and what was said about the file."""
        self._system = self._info = None


class _PastEnd(OSError):
    """A range that starts after the end of the file."""


def translated(error: Exception, url: str) -> Exception:
    """Returns the error as one of the few kinds that matter, with the location; others as they are."""
    place, status = shown(url), getattr(error, "status", None)  # of answers by HTTP
    if isinstance(error, FileNotFoundError) and url.startswith("http"):
        # fsspec's HTTP calls every failure of a HEAD request "not found"; its cause tells.
        status = 404 if error.__cause__ is None else getattr(error.__cause__, "status", 0)
        if status == 0 or status >= 500 or status in (408, 429):
            return ConnectionError(f"no answer about the file: {redacted(repr(error.__cause__), url)}")
    text = redacted(str(error), url)
    if status in (401, 403) or isinstance(error, PermissionError):
        return PermissionError(f"{place}: access is denied ({text}); check the credentials of this node")
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{place} is not there; restore it or correct the recipe")
    if status == 416 or (isinstance(error, OSError) and error.errno == errno.EINVAL):
        return _PastEnd(text)
    return error


def is_passing(error: Exception) -> bool:
    """Returns whether an error may go away by itself: most that a network makes, of whatever package."""
    return not isinstance(error, (FileNotFoundError, PermissionError, _PastEnd, ValueError, *BUGS))
