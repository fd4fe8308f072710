"""Local files are read through the moods of network file systems; a pass over a file makes few requests."""

import errno
import os
import threading

import pytest

from eagle_train.data import byte_ranges
from eagle_train.data.byte_ranges import LocalFile, ReadAhead
from eagle_train.data.retries import Retries, StorageError
from eagle_train.data.storage import Storage, open_shard

CONTENT = bytes(range(256)) * 1000
QUICK = Storage(attempts=4, backoff_seconds=0.0)


def failing_pread(monkeypatch, faults):
    """Makes `os.pread` raise or answer as `faults` say, then works."""
    real = os.pread

    def pread(descriptor, size, offset):
        fault = faults.pop(0) if faults else None
        if isinstance(fault, OSError):
            raise fault
        return real(descriptor, min(size, fault or size), offset)

    monkeypatch.setattr(byte_ranges.os, "pread", pread)


def test_a_network_file_system_is_opened_again(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    reader = open_shard(tmp_path / "a.tar", QUICK)
    assert reader.read_range(0, 1) == CONTENT[:1]
    faults = [OSError(code, "?") for code in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)]
    failing_pread(monkeypatch, faults)
    opened = []
    real = os.open
    monkeypatch.setattr(byte_ranges.os, "open", lambda *args: opened.append(args) or real(*args))
    assert reader.read_range(3, 5) == CONTENT[3:8]
    assert faults == [] and len(opened) == 3
    failing_pread(monkeypatch, [OSError(errno.EIO, "?")] * 4)
    with pytest.raises(StorageError, match=r"a\.tar: 4 attempts"):
        reader.read_range(3, 5)


def test_other_errors_of_a_disk_are_not_tried_again(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    faults = [OSError(errno.EACCES, "denied"), OSError(errno.EIO, "?")]
    failing_pread(monkeypatch, faults)
    with pytest.raises(StorageError, match=r"a\.tar: .*denied; make it readable"):
        open_shard(tmp_path / "a.tar", QUICK).read_range(0, 1)
    assert len(faults) == 1
    with pytest.raises(FileNotFoundError):
        open_shard(tmp_path / "b.tar", QUICK).read_range(0, 1)


def test_short_answers_of_a_disk_are_completed(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    faults = [10, 1, 20]
    failing_pread(monkeypatch, faults)
    assert open_shard(tmp_path / "a.tar").read_range(100, 1000) == CONTENT[100:1100] and faults == []


def test_threads_may_read_while_one_closes(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    reader, wrong = open_shard(tmp_path / "a.tar"), []

    def read():
        for k in range(300):
            if reader.read_range(k, 50) != CONTENT[k : k + 50]:
                wrong.append(k)
            reader.close()

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Counting(LocalFile):
    """Notes the ranges it is asked for."""

    def __init__(self, path, gap_bytes):
        super().__init__(path, Retries())
        self.gap_bytes, self.asked = gap_bytes, []

    def read_range(self, offset, size):
        self.asked.append((offset, size))
        return super().read_range(offset, size)


def test_a_pass_over_a_shard_makes_few_large_requests(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    file = Counting(tmp_path / "a.tar", gap_bytes=1000)
    ahead = ReadAhead(file)
    for offset in range(0, len(CONTENT) - 100, 300):
        assert ahead.read_range(offset, 100) == CONTENT[offset : offset + 100]
        assert ahead.read_range(max(0, offset - 300), 50) == CONTENT[max(0, offset - 300) :][:50], "just behind"
    assert len(file.asked) < 30 and sum(size for _, size in file.asked) < 1.2 * len(CONTENT)
    far = ReadAhead(wide := Counting(tmp_path / "a.tar", gap_bytes=1000))
    for offset in range(0, len(CONTENT), 50_000):
        assert far.read_range(offset, 10) == CONTENT[offset : offset + 10]
    assert [size for _, size in wide.asked[1:]] == [1000] * 5, "far apart: no more than a gap is read in vain"
