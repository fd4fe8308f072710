"""Storage that is slow or fails under the loader: it is waited for, or named, and no sample is lost silently."""

import errno
import os
import time
from pathlib import Path

import pytest

from eagle_train.data.loader import RowDataset
from eagle_train.data.retries import StorageError
from tests.data.loads import digests, errors, load, open_data, tiny_encoder
from tests.data.test_bad_samples import GOOD

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.fixture(scope="module")
def encoder(data):
    return tiny_encoder(data)


@pytest.fixture
def found(tmp_path, encoder):
    """The catalog of 20 good samples in 4 shards."""
    return open_data(tmp_path, GOOD, encoder)


@pytest.fixture
def storage(monkeypatch):
    """Reads of a shard go through `storage.before(path)`, which may wait or raise."""
    read = os.pread

    class Storage:
        reads = 0

        def before(self, path):
            """Does nothing."""

        def pread(self, descriptor, size, offset):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path.suffix == ".tar":
                self.reads += 1
                self.before(path)
            return read(descriptor, size, offset)

    here = Storage()
    monkeypatch.setattr(os, "pread", here.pread)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 4])
def test_slow_storage_changes_nothing_but_time(found, encoder, storage, workers):
    expected = digests(load(RowDataset(found, encoder)))
    assert storage.reads >= 40
    storage.before = lambda path: time.sleep(0.02)
    assert digests(load(RowDataset(found, encoder), workers)) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_fails_is_named_and_counted_and_what_comes_after_is_whole(found, encoder, storage, workers):
    expected = list(load(RowDataset(found, encoder)))

    def fail(path):
        if path.stem == "s-000003":
            raise OSError(errno.ENOENT, "No such file", str(path))

    storage.before = fail
    left = list(load(RowDataset(found, encoder), workers))
    bad = errors(left)
    assert {error.key for error in bad} == {f"s/s-000003/good{n:03d}" for n in range(15, 20)}
    assert all("s-000003.tar" in error.detail and "No such file" in error.detail for error in bad)
    used = [len(use.keys) for _, rows in left for use in rows]
    planned = [len(use.keys) for _, rows in expected for use in rows]
    assert sum(planned) == sum(used) + len(bad) == 40


def test_storage_that_fails_for_a_moment_changes_nothing(found, encoder, storage, monkeypatch):
    expected = digests(load(RowDataset(found, encoder)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    failures = []

    def fail(path):
        if path.stem == "s-000003" and len(failures) < 3:
            failures.append(path)
            raise OSError(errno.EIO, "Input/output error", str(path))

    storage.before = fail
    assert digests(load(RowDataset(found, encoder))) == expected and len(failures) == 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EIO, "6 attempts .*Input/output error"),
        (errno.ENOTCONN, "6 attempts .*not connected"),
        (errno.EACCES, ".*Permission denied.*; make it readable"),
        (errno.EMFILE, ".*Too many open files.*; make it readable"),
    ],
)
def test_storage_that_fails_for_ever_stops_the_run_and_names_the_shard(
    found, encoder, storage, monkeypatch, code, message
):
    """A disk that is away, or a right that this process lacks, must not pass for bad samples."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def fail(path):
        if path.stem == "s-000003":
            raise OSError(code, os.strerror(code), str(path))

    storage.before = fail
    with pytest.raises(StorageError, match=rf"s-000003\.tar: {message}"):
        list(load(RowDataset(found, encoder)))
