"""Shards are read from anywhere, through passing failures; what fails for good says what and what to do."""

import multiprocessing
import pickle
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from eagle_train.data.index import ensure_index
from eagle_train.data.retries import StorageError
from eagle_train.data.shard_reader import Member
from eagle_train.data.shards import scan_shard
from eagle_train.data.storage import Storage, exists, glob, open_shard
from tests.data.range_server import serving

CONTENT = bytes(range(256)) * 1000
QUICK = Storage(attempts=4, backoff_seconds=0.0, timeout_seconds=5.0)


@pytest.fixture
def server():
    with serving(a=CONTENT) as running:
        yield running


@pytest.fixture
def memory():
    """An empty object store in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture(params=["path", "file", "memory", "http"])
def location(request, tmp_path, memory, server):
    """The same shard in every kind of place."""
    (tmp_path / "a.tar").write_bytes(CONTENT)
    memory.pipe("/bucket/a.tar", CONTENT)
    places = {"path": tmp_path / "a.tar", "file": f"file://{tmp_path}/a.tar", "memory": "memory://bucket/a.tar"}
    return places.get(request.param) or server.url("a.tar")


def test_every_place_gives_the_same_bytes(location):
    reader = open_shard(location, QUICK)
    assert reader.size == len(CONTENT)
    assert reader.read(Member("x", 1000, 300)) == CONTENT[1000:1300]
    assert reader.read_range(len(CONTENT) - 7, 7) == CONTENT[-7:]
    assert reader.read_range(0, 0) == reader.read_range(len(CONTENT), 0) == b""
    assert exists(location, QUICK)
    reader.close()
    assert reader.read_range(5, 3) == CONTENT[5:8], "a closed reader opens again: caches of readers close them"
    reader.close()


def test_a_shard_that_ends_too_early_is_an_error_with_the_numbers(location):
    reader = open_shard(location, QUICK)
    for _ in range(2):  # before and after its size is known
        with pytest.raises(OSError, match=r"a\.tar has 10 of 40 bytes from 255990 on") as error:
            reader.read_range(len(CONTENT) - 10, 40)
        assert not isinstance(error.value, StorageError)
    with pytest.raises(OSError, match="has 0 of 40 bytes"):
        open_shard(location, QUICK).read_range(len(CONTENT) + 100, 40)


def test_an_absent_shard_is_not_found_at_once(location):
    for absent in (Path("/nowhere/b.tar"), str(location).replace("a.tar", "b.tar")):
        with pytest.raises(FileNotFoundError, match=r"b\.tar"):
            open_shard(absent, Storage(attempts=9, backoff_seconds=3.0)).read_range(0, 1)
        assert not exists(absent, QUICK)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_a_reader_crosses_to_other_processes(location):
    reader = open_shard(location, QUICK)
    assert reader.read_range(0, 4) == CONTENT[:4]
    again = pickle.loads(pickle.dumps(reader))
    assert again.location == reader.location and again.read_range(0, 4) == CONTENT[:4]
    if str(location).startswith("memory"):  # each process has a memory of its own
        return
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(reader.read_range, (9, 9)) == CONTENT[9:18]
    assert reader.read_range(0, 4) == CONTENT[:4]


@pytest.mark.parametrize(
    "location",
    [
        "pipe:cat /etc/passwd",
        "ftp://host/a.tar",
        "simplecache::s3://b/a.tar",
        "s3:/b/a.tar",
        Path("s3://b/a.tar"),
        "s3://",
    ],
)
def test_other_protocols_are_refused(location):
    for function in (open_shard, exists, glob):
        with pytest.raises(ValueError, match=r"is not read this way; use one of .*s3://"):
            function(location)


def test_a_missing_package_says_what_to_install(monkeypatch):
    def absent(protocol, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(ValueError, match=r"s3://b/a\.tar.*Install s3fs.*pip install eagle-train\[remote\]"):
        open_shard("s3://b/a.tar", Storage(attempts=9, backoff_seconds=3.0)).read_range(0, 1)


@pytest.mark.parametrize("settings", [{"attempts": 0}, {"backoff_seconds": -1.0}, {"timeout_seconds": 0.0}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Storage(**settings)


@pytest.mark.parametrize("fault", ["drop", "short", 500, 503, 429])
def test_failures_of_a_server_pass(server, fault):
    server.faults = [fault] * 3
    assert open_shard(server.url("a.tar"), QUICK).read_range(500, 2000) == CONTENT[500:2500]
    assert server.faults == [] and sum(r[0] == "GET" for r in server.requests) == 4


def test_a_server_that_stays_broken_is_no_missing_shard(server):
    server.faults = [500] * 99
    with pytest.raises(
        StorageError, match=r"a\.tar: 4 attempts in .* s failed, the last with .*500.*check the network"
    ):
        open_shard(server.url("a.tar"), QUICK).read_range(0, 9)
    assert len(server.faults) == 95


def test_a_server_that_is_down_is_no_missing_shard(server):
    url = server.url("a.tar")
    server.shutdown()
    server.server_close()
    reader = open_shard(url, QUICK)
    for question in (lambda: reader.read_range(0, 9), lambda: reader.size, lambda: exists(url, QUICK)):
        with pytest.raises(StorageError, match="4 attempts"):
            question()


def test_a_slow_answer_is_asked_for_again(server):
    server.faults = [30.0]
    assert open_shard(server.url("a.tar"), Storage(timeout_seconds=0.3, backoff_seconds=0.0)).read_range(0, 9)
    assert len(server.requests) == 2


def test_denied_access_is_said_at_once_and_keeps_the_signature_secret(server):
    server.faults = [403]
    with pytest.raises(PermissionError, match=r"access is denied.*credentials") as error:
        open_shard(server.url("a.tar?sig=SECRET"), QUICK).read_range(0, 9)
    assert "SECRET" not in str(error.value) and len(server.requests) == 1
    server.faults = [500] * 4
    with pytest.raises(StorageError) as error:
        open_shard(server.url("a.tar?sig=SECRET"), QUICK).read_range(0, 9)
    assert "SECRET" not in str(error.value)


def test_a_server_without_ranges_is_refused(server):
    server.serves_ranges = False
    with pytest.raises(ValueError, match="asked for 9 bytes, got 256000: this server does not serve byte ranges"):
        open_shard(server.url("a.tar"), QUICK).read_range(0, 9)
    assert len(server.requests) == 1


class Flaky(MemoryFileSystem):
    """Raises what `faults` hold, one a request; others are answered."""

    cachable = False
    faults = []

    def cat_file(self, path, start=None, end=None, **kwargs):
        if self.faults:
            raise self.faults.pop(0)
        return super().cat_file(path, start, end, **kwargs)


@pytest.fixture
def flaky(memory):
    """A store whose requests fail as `Flaky.faults` say."""
    memory.pipe("/bucket/a.tar", CONTENT)
    fsspec.register_implementation("memory", Flaky, clobber=True)
    yield Flaky
    Flaky.faults = []
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


def test_a_bug_is_not_tried_again(flaky):
    flaky.faults = [TypeError("a bug"), OSError("passing")]
    reader = open_shard("memory://bucket/a.tar", QUICK)
    with pytest.raises(TypeError, match="a bug"):
        reader.read_range(0, 9)
    assert reader.read_range(0, 9) == CONTENT[:9] and flaky.faults == []


def test_pauses_double_and_vary_and_leave_the_random_numbers_alone(flaky, monkeypatch):
    import random

    pauses = []
    monkeypatch.setattr("eagle_train.data.retries.time.sleep", pauses.append)
    flaky.faults = [OSError("passing")] * 8
    random.seed(7)
    expected = random.random()
    random.seed(7)
    with pytest.raises(StorageError):
        open_shard("memory://bucket/a.tar", Storage(attempts=8, backoff_seconds=1.0)).read_range(0, 9)
    assert random.random() == expected
    assert len(pauses) == 7, "no pause after the last"
    for pause, middle in zip(pauses, [1, 2, 4, 8, 16, 30, 30], strict=True):
        assert 0.5 * middle <= pause <= 1.5 * middle
    assert len(set(pauses)) == 7


def test_globs_are_sorted_wherever_they_look(tmp_path, memory):
    for name in ("x-1.tar", "x-0.tar", "x-0.json", "y.tar"):
        (tmp_path / name).write_bytes(b"?")
        memory.pipe(f"/bucket/d/{name}", b"?")
    assert glob(tmp_path / "x-*.tar") == glob(f"file://{tmp_path}/x-*.tar") == [tmp_path / f"x-{i}.tar" for i in (0, 1)]
    assert glob("memory://bucket/d/x-?.tar") == [f"memory://bucket/d/x-{i}.tar" for i in (0, 1)]
    assert glob("memory://nobucket/*.tar") == glob(tmp_path / "z*.tar") == glob(tmp_path / "z.tar") == []
    assert glob(tmp_path / "x-{0..5}.tar") == [tmp_path / f"x-{i}.tar" for i in (0, 1)]
    listed = ["http://host/a-08.tar?s=1", "http://host/a-09.tar?s=1", "http://host/a-10.tar?s=1"]
    assert glob("http://host/a-{08..10}.tar?s=1") == listed


def test_relative_globs_stay_relative(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tar").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert glob("d/*.tar") == [Path("d/a.tar")] and exists("d/a.tar")


def test_an_index_is_built_from_few_requests(server, tmp_path, data):
    shard = sorted(data.rglob("*.tar"))[0]
    server.files["a.tar"] = shard.read_bytes()
    reader = open_shard(server.url("a.tar"), QUICK).read_ahead()
    found = []
    for key, members in scan_shard(reader):
        found.append((key, members, reader.read_members(members)))
    local = open_shard(shard)
    assert found == [(key, members, local.read_members(members)) for key, members in scan_shard(shard)]
    assert len(found) > 5 and sum(r[0] == "GET" for r in server.requests) <= 2
    assert ensure_index(shard, tmp_path).exists()
