"""A node's cache of shards only ever saves time: no trouble with its disk, and no other process, changes a byte."""

import errno
import logging
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path

import pytest

from eagle_train.data import shard_cache
from eagle_train.data.byte_ranges import RangeFile
from eagle_train.data.retries import StorageError
from eagle_train.data.shard_cache import CachedFile, ShardCache
from eagle_train.data.storage import Storage, open_shard
from tests.data.range_server import serving

CONTENT = {name: bytes([ord(name)]) * 1000 for name in "abcd"}


class Remote(RangeFile):
    """A shard of 1000 equal bytes far away. It counts what is read, and may be slow, change, or fail."""

    gap_bytes = 1

    def __init__(self, name="a", seconds=0.0, versions=("1",), fails=()):
        self.location, self.content = f"memory://bucket/{name}.tar", CONTENT[name]
        self.seconds, self.versions, self.fails, self.reads = seconds, list(versions), list(fails), []

    def size(self):
        return len(self.content)

    def version(self):
        return self.versions[0]

    def read_range(self, offset, size):
        self.reads.append(size)
        time.sleep(self.seconds if size > 500 else 0.0)
        if self.fails and size > 500:
            raise self.fails.pop(0)
        return self.content[offset : offset + size]

    def close(self):
        if len(self.versions) > 1:
            del self.versions[0]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def cache(folder, **settings):
    return ShardCache(**{"folder": str(folder), "max_bytes": 2500, "wait_seconds": 0.0} | settings)


def kept(folder):
    """Names of the shards that are kept; nothing else may lie about."""
    found = list(folder.iterdir())
    assert all(path.suffix == shard_cache.WHOLE and path.stat().st_size == 1000 for path in found)
    return sorted(path.name.partition("-")[2].partition(".")[0] for path in found)


def test_a_shard_is_downloaded_once_and_read_from_the_disk(folder):
    remote = Remote()
    reader = CachedFile(remote, cache(folder))
    assert reader.read_range(10, 5) == reader.read_range(990, 10)[:5] == b"aaaaa"
    assert remote.reads == [1000] and kept(folder) == ["a"]
    other = CachedFile(second := Remote(), cache(folder))
    assert other.read_range(0, 1000) == CONTENT["a"] and second.reads == []
    assert pickle.loads(pickle.dumps(other)).read_range(3, 4) == b"aaaa"


def test_it_works_over_http(folder):
    with serving(a=CONTENT["a"], b=CONTENT["b"]) as server:
        storage = Storage(attempts=2, backoff_seconds=0.0, cache=cache(folder))
        readers = [open_shard(server.url(name), storage) for name in ("a.tar", "b.tar?signature=1")]
        for _ in range(3):
            assert [reader.read_range(7, 2) for reader in readers] == [b"aa", b"bb"]
        assert sum(request[0] == "GET" for request in server.requests) == 2
        assert readers[0].identity() == open_shard(server.url("a.tar")).identity()
    assert kept(folder) == ["a", "b"]


def test_a_shard_that_was_written_again_is_downloaded_again(folder):
    assert CachedFile(Remote(), cache(folder)).read_range(0, 1) == b"a"
    changed = Remote(versions=["2"])
    changed.content = b"x" * 1000
    assert CachedFile(changed, cache(folder)).read_range(0, 1) == b"x"


def test_a_shard_written_again_during_its_download_is_not_kept(folder, caplog):
    remote = Remote(versions=["1", "2"])
    assert CachedFile(remote, cache(folder)).read_range(0, 1) == b"a"
    assert kept(folder) == [] and remote.reads == [1000, 1] and "written again" in caplog.text


def test_what_was_used_longest_ago_goes_first(folder):
    small = cache(folder)
    readers = {}
    for age, name in enumerate("ab"):
        readers[name] = CachedFile(Remote(name), small)
        readers[name].read_range(0, 1)
        path = small.place(Remote(name))
        os.utime(path, (time.time() - 100 + age,) * 2)
    assert CachedFile(Remote("a"), small).read_range(0, 1) == b"a"  # used again: b is older now
    CachedFile(Remote("c"), small).read_range(0, 1)
    assert kept(folder) == ["a", "c"]
    assert readers["b"].read_range(5, 3) == b"bbb", "who has it open reads on"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= small.max_bytes


def test_a_shard_in_steady_use_is_noted_as_used(folder, monkeypatch):
    small = cache(folder)
    reader = CachedFile(Remote(), small)
    reader.read_range(0, 1)
    path = small.place(Remote())
    os.utime(path, (1, 1))
    reader.read_range(0, 1)
    assert path.stat().st_mtime == 1, "not at every read"
    monkeypatch.setattr(shard_cache, "TOUCH_SECONDS", 0.0)
    reader.read_range(0, 1)
    assert path.stat().st_mtime > 1


def test_a_shard_larger_than_the_cache_pushes_nothing_out(folder, caplog):
    CachedFile(Remote("a"), cache(folder)).read_range(0, 1)
    remote = Remote("b")
    reader = CachedFile(remote, cache(folder, max_bytes=999))
    assert reader.read_range(0, 2) == reader.read_range(2, 2) == b"bb"
    assert remote.reads == [2, 2] and kept(folder) == ["a"] and "max_bytes=999" in caplog.text


def full_disk(monkeypatch, after):
    """Makes the disk full after so many bytes of a download."""
    real = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[:after])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        Path, "open", lambda path, mode="r": Full(real(path, mode)) if "w" in mode else real(path, mode)
    )


def test_a_full_disk_warns_once_and_costs_speed_only(folder, monkeypatch, caplog):
    full_disk(monkeypatch, after=600)
    here, remotes = cache(folder), [Remote("a"), Remote("b")]
    for remote in remotes:
        reader = CachedFile(remote, here)
        assert [reader.read_range(k, 2) for k in range(3)] == [CONTENT[remote.location[-5]][:2]] * 3
        assert remote.reads == [1000, 2, 2, 2], "one try for each opening"
    assert kept(folder) == []
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "No space left" in caplog.text


def test_no_download_begins_on_a_disk_without_room(folder, monkeypatch, caplog):
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda path: shard_cache.shutil._ntuple_diskusage(9, 8, 1))
    remote = Remote()
    assert CachedFile(remote, cache(folder)).read_range(0, 2) == b"aa"
    assert remote.reads == [2] and kept(folder) == [] and "1 bytes left" in caplog.text


def test_a_folder_that_cannot_be_made_costs_speed_only(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    here = cache(tmp_path / "file" / "cache")
    for name in "ab":
        assert CachedFile(Remote(name), here).read_range(0, 2) == CONTENT[name][:2]
    assert len(caplog.records) == 1 and "read over the network" in caplog.text


def test_a_folder_that_cannot_be_written_costs_speed_only(folder, monkeypatch, caplog):
    def denied(*args):
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(shard_cache.os, "open", denied)
    assert CachedFile(Remote(), cache(folder)).read_range(0, 2) == b"aa" and "denied" in caplog.text


def test_a_failed_download_leaves_nothing_and_raises(folder):
    remote = Remote(fails=[StorageError("the network is down")])
    reader = CachedFile(remote, cache(folder))
    with pytest.raises(StorageError):
        reader.read_range(0, 2)
    assert kept(folder) == []
    assert reader.read_range(0, 2) == b"aa" and kept(folder) == ["a"]


def test_a_kept_file_of_another_size_is_not_used(folder):
    here = cache(folder)
    CachedFile(Remote(), here).read_range(0, 1)
    here.place(Remote()).write_bytes(b"half")
    assert CachedFile(Remote(), here).read_range(500, 2) == b"aa" and kept(folder) == ["a"]


def test_a_kept_file_that_is_cut_while_open_is_read_over_the_network(folder, caplog):
    reader = CachedFile(Remote(), cache(folder))
    reader.read_range(0, 1)
    os.truncate(cache(folder).place(Remote()), 100)
    assert reader.read_range(500, 2) == b"aa" and "was cut" in caplog.text


def test_a_partial_file_is_never_taken_for_whole(folder):
    here = cache(folder)
    slow = Remote(seconds=0.5)
    thread = threading.Thread(target=CachedFile(slow, here).read_range, args=(0, 1))
    thread.start()
    while not (folder.is_dir() and any(path.suffix == shard_cache.PARTIAL for path in folder.iterdir())):
        time.sleep(0.01)
    other = Remote()
    assert CachedFile(other, here).read_range(900, 2) == b"aa" and other.reads == [2], "not from a file full of zeros"
    thread.join()
    assert kept(folder) == ["a"]


def test_a_waiting_reader_uses_the_download_of_another(folder):
    here = cache(folder, wait_seconds=5.0)
    slow, other = Remote(seconds=0.3), Remote()
    thread = threading.Thread(target=CachedFile(slow, here).read_range, args=(0, 1))
    thread.start()
    while not slow.reads:
        time.sleep(0.01)
    assert CachedFile(other, here).read_range(900, 2) == b"aa" and other.reads == []
    thread.join()


def test_the_wait_ends_and_happens_once(folder):
    here = cache(folder, wait_seconds=0.2)
    folder.mkdir()
    lock = here.place(Remote()).with_name(here.place(Remote()).name + shard_cache.LOCK)
    lock.touch()
    reader, start = CachedFile(remote := Remote(), here), time.monotonic()
    assert [reader.read_range(k, 2) for k in range(20)] == [b"aa"] * 20
    assert 0.2 <= time.monotonic() - start < 0.39 and remote.reads == [2] * 20
    lock.unlink()
    assert reader.read_range(0, 2) == b"aa" and kept(folder) == ["a"], "as soon as it can"


def test_what_a_killed_process_left_is_cleared(folder):
    here = cache(folder, stale_seconds=50.0, wait_seconds=1.0)
    folder.mkdir()
    place = here.place(Remote())
    lock = place.with_name(place.name + shard_cache.LOCK)
    partial = place.with_name(f"{place.name}.0{shard_cache.PARTIAL}")
    for path in (lock, partial):
        path.write_bytes(b"x" * 2000)
        os.utime(path, (time.time() - 60,) * 2)
    (folder / "notes.txt").write_text("of the user")
    assert CachedFile(remote := Remote(), here).read_range(0, 2) == b"aa" and remote.reads == [1000]
    (folder / "notes.txt").unlink()  # it was left alone
    assert kept(folder) == ["a"]


def race(folder, barrier, results):
    remote = Remote(seconds=0.3)
    reader = CachedFile(remote, cache(folder, wait_seconds=5.0))
    barrier.wait()
    results.put((reader.read_range(0, 1000) == CONTENT["a"], remote.reads))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_of_racing_processes_one_downloads(folder):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=race, args=(folder, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=20) for _ in processes]
    for process in processes:
        process.join()
    assert all(right for right, _ in found)
    assert sorted(len(reads) for _, reads in found) == [0, 0, 1] and kept(folder) == ["a"]


@pytest.mark.parametrize("settings", [{"max_bytes": 0}, {"wait_seconds": -1.0}, {"stale_seconds": 0.0}])
def test_settings_are_checked(folder, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        cache(folder, **settings)
