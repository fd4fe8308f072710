"""Work that leaves files, shared by all ranks of a run, and by runs at the same time, through the files alone.

An item is one file to be made. Who makes it holds `<file>.claim` meanwhile, created exclusively, so that nobody else
does. The holder touches its claims every few seconds; a claim that is not touched for long, or whose process is gone,
is taken over. Nobody waits in a collective, which would time out while a large data set is indexed: ranks that find
nothing left to do look again until all is there. Should two make the same file after all (a claim was taken over from a
process that was merely stopped for long), nothing is lost: files are published whole, by rename.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import psutil

from eagle_train.data.work_pool import open_pool

Item = TypeVar("Item")
CHECK_THREADS = 16
"""Look for files at the same time; on a network file system each look waits for an answer."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Times in seconds.

    Args:
        poll: between looks at what others make.
        beat: between touches of own claims.
        stale: a claim of another machine that is not touched for so long is taken over.
    """

    poll: float = 1.0
    beat: float = 10.0
    stale: float = 120.0


def share_work(
    items: Mapping[Path, Item],
    make: Callable[[Item], object],
    is_done: Callable[[Path, Item], bool],
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 1,
    progress: Callable[[int], None] = lambda count: None,
    stop: Callable[[], bool] = lambda: False,
    patience: Patience = Patience(),
) -> None:
    """Returns when all files are there, made by this or other processes that share the work, or `stop` says so.

    What is made stays if this stops in between. Ranks begin at different places and help each other to the end.

    Args:
        items: by the file that is to be made of each; the same on all ranks.
        make: makes the file of an item, published by rename; sent to other processes if `workers` > 1.
        is_done: whether a file is there and good.
        workers: processes of this rank that make files; 1: this one.
        progress: is called with the number of files that are newly known to be there.
        stop: returns whether to begin no other file, and to return when those that were begun are there.

    Raises:
        ValueError: names the file that `make` failed for, on every rank; other files may be left to be made.
    """
    first = rank * len(items) // world_size
    paths = [*items][first:] + [*items][:first]
    with ThreadPoolExecutor(CHECK_THREADS) as threads:
        done = list(threads.map(lambda path: is_done(path, items[path]), paths))
    missing = [path for path, is_there in zip(paths, done, strict=True) if not is_there]
    progress(len(paths) - len(missing))
    if not missing:
        return
    with Claims(patience) as claims, open_pool(make, min(workers, len(missing))) as pool:
        todo, others = deque(missing), deque()
        looked = time.monotonic()
        while todo or others or pool.busy:
            if stop():
                todo, others = deque(), deque()
            while todo and pool.busy < pool.size:
                path = todo.popleft()
                if not claims.take(path):
                    others.append(path)
                elif is_done(path, items[path]):  # since we looked
                    claims.give_back(path)
                    progress(1)
                else:
                    pool.begin(path, items[path])
            for path, _ in pool.wait(patience.poll):
                claims.give_back(path)
                progress(1)
            if time.monotonic() - looked >= patience.poll or not (todo or pool.busy):
                looked = time.monotonic()
                for _ in range(len(others)):
                    path = others.popleft()
                    (others if claims.is_held(path) else todo).append(path)
                if others and not todo and not pool.busy:
                    time.sleep(patience.poll)


class Claims:
    """The claims of this process, touched by a thread as long as this is open; given back in the end."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._own: dict[Path, bytes] = {}
        self._seen: dict[Path, tuple[int, float]] = {}
        """Claims of others: their time as the file system tells it, and our time when we first saw that."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        for path in list(self._own):
            self.give_back(path)

    def take(self, path: Path) -> bool:
        """Returns whether the file is ours to make now.

        Raises:
            ValueError: if the folder is not writable; the remedy is `index_dir`.
        """
        claim = claim_path(path)
        if self.is_held(path):
            return False
        token = f"{machine()} {os.getpid()} {uuid.uuid4().hex}".encode()
        try:
            if not claim.parent.is_dir():
                claim.parent.mkdir(parents=True, exist_ok=True)
            write_claim(claim, token)
        except OSError as error:
            if isinstance(error, FileExistsError) and claim.parent.is_dir():
                return False  # somebody was faster
            raise ValueError(f"cannot write {claim} ({error}); set index_dir to a writable folder") from error
        self._own[path] = token
        return True

    def give_back(self, path: Path) -> None:
        """Gives up a claim of ours."""
        token = self._own.pop(path)
        claim = claim_path(path)
        if read_claim(claim) == token:  # not another's that took it over
            claim.unlink(missing_ok=True)

    def is_held(self, path: Path) -> bool:
        """Returns whether somebody else is at work on a file; a claim that was left behind is removed."""
        claim = claim_path(path)
        content = read_claim(claim)
        if content is None:
            return False
        if not self._is_left_behind(claim, content):
            return True
        aside = claim.with_name(f"{claim.name}.{uuid.uuid4().hex[:12]}")
        try:
            claim.rename(aside)  # of several that find it, one moves it
        except FileNotFoundError:
            return True
        moved = aside.read_bytes()
        aside.unlink()
        if moved == content:
            return False
        with suppress(FileExistsError):
            write_claim(claim, moved)  # of another that took it over since we looked
        return True

    def _is_left_behind(self, claim: Path, content: bytes) -> bool:
        """Returns whether the holder of a claim is dead, or was silent for too long."""
        where, _, rest = content.decode(errors="replace").partition(" ")
        pid = rest.partition(" ")[0]
        if where == machine() and pid.isdigit() and not is_alive(int(pid)):
            return True
        try:
            touched = claim.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        # Clocks of machines differ, so what counts is how long we saw no change.
        seen, since = self._seen.get(claim, (None, 0.0))
        if seen != touched:
            self._seen[claim] = (touched, time.monotonic())
            return False
        return time.monotonic() - since > self._patience.stale

    def _beat(self) -> None:
        while not self._closed.wait(self._patience.beat):
            for path in list(self._own):
                try:
                    os.utime(claim_path(path))
                except OSError:  # taken over, or out of reach for now; the next beat tries again
                    continue


def claim_path(path: Path) -> Path:
    """Returns where the claim on a file is."""
    return path.with_name(f"{path.name}.claim")


def read_claim(claim: Path) -> bytes | None:
    """Returns what a claim says; None if there is none."""
    try:
        return claim.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_claim(claim: Path, content: bytes) -> None:
    """Writes a claim; raises FileExistsError if there is one."""
    with os.fdopen(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "wb") as file:
        file.write(content)


def is_alive(pid: int) -> bool:
    """Returns whether a process of this machine runs; one that was killed and not yet waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # somebody else's
        return True


@cache
def machine() -> str:
    """Returns a name of this machine since its start, and of the container: where a process number means the same."""
    parts = [platform.node()]
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        if path.is_symlink():
            parts.append(str(path.readlink()))
        elif path.is_file():
            parts.append(path.read_text().strip())
    return "/".join(parts).replace(" ", "_")
