"""What breaks under the loader: every fault is named with key and shard, and what is whole comes through unchanged."""

import errno
import io
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.catalog import Source
from eagle_train.data.degrade import EachByItself
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader
from eagle_train.data.loader import RowDataset, RowTask
from eagle_train.data.loss_weights import per_token
from eagle_train.data.replay import digest
from eagle_train.data.retries import StorageError
from eagle_train.data.shards import write_shards
from eagle_train.data.step_loader import MAX_RESTARTS, StepLoader
from eagle_train.data.stream import steps
from eagle_train.data.tiling import PadToSquare
from eagle_train.train.assemble import load_tokenizer
from eagle_train.train.config import build, load_config
from tests.catalogs import plan_config, read_catalog
from tests.data.test_bad_samples import GOOD, png, record

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.fixture(scope="module")
def encoder(data):
    return Encoder(
        template=build(load_config(["+experiment=toy"])["chat_template"]),
        tokenizer=load_tokenizer(str(data / "tokenizer")),
        images=ImageReader(),
        tiling=PadToSquare(),
        degrade=EachByItself(frames=FrameRate()),
        tile_size=16,
        tokens_per_tile=4,
        loss_weight=per_token,
    )


@pytest.fixture
def found(tmp_path, encoder):
    """The catalog of 20 good samples in 4 shards."""
    return open_data(tmp_path, GOOD, encoder)


def open_data(folder, samples, encoder):
    shards = write_shards(samples, folder / "s", samples_per_shard=5)
    return read_catalog([Source(name="s", shards=shards)], encoder, 64)


def load(dataset, workers=0):
    """Returns the loader of two epochs in rows of 64 tokens, two a step."""
    config = plan_config(dataset.catalog, max_length=64, rows_per_step=2, num_epochs=2)
    return StepLoader(
        dataset=dataset,
        steps=steps(dataset.catalog, config),
        rank=0,
        world_size=1,
        micro_batches=2,
        num_workers=workers,
        prefetch=2,
        row_bytes=1 << 16,
    )


def digests(loaded):
    return [digest(row) for _, rows in loaded for row in rows]


def errors(loaded):
    return [error for _, rows in loaded for row in rows for _, error in row.errors]


def row_of(catalog, dataset=None, samples=range(20)):
    """One row of the named samples."""
    return (dataset or RowDataset(catalog, None))[RowTask(3, np.array(list(samples)))]


def jpeg(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def test_of_a_shard_cut_before_its_index_is_built_the_whole_samples_stay(tmp_path, encoder):
    shards = write_shards(GOOD, tmp_path / "s", samples_per_shard=5)
    os.truncate(shards[2], shards[2].stat().st_size // 2)
    source = Source(name="s", shards=shards)
    with pytest.raises(TooManyBadSamples, match=r"rest from byte \d+: missing_shard: .*s-000002\.tar is not"):
        read_catalog([source], encoder, 64, share=0.0)
    catalog = read_catalog([source], encoder, 64)
    assert catalog.dropped() == {"s": {"missing_shard": 1}}
    assert 15 < catalog.source_summaries()[0].num_usable < 20


def test_a_shard_cut_after_its_index_was_built_is_noticed_at_the_next_start(found, encoder):
    shard = found.shards[1].location
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(TooManyBadSamples, match=r"s-000001\.tar is not a whole tar"):
        read_catalog(found.sources, encoder, 64, share=0.0)


def test_a_shard_cut_between_two_samples_is_noticed_by_its_manifest(found, encoder):
    shard = found.shards[1].location
    last = found.index_row(1, 2)["members"][-1]
    os.truncate(shard, -(-(last["offset"] + last["size"]) // 512) * 512)
    with pytest.raises(ValueError, match=r"s-000001\.tar holds 3 samples, shards\.json beside it says 5"):
        read_catalog(found.sources, encoder, 64)


def test_a_shard_cut_while_training_drops_what_is_behind_the_cut(found, encoder):
    shard = found.shards[1].location
    dataset = RowDataset(found, encoder)
    assert not row_of(found, dataset).errors
    members = found.index_row(1, 2)["members"]
    os.truncate(shard, members[-1]["offset"] + members[-1]["size"] // 2)  # through an image of its third sample
    row = row_of(found, dataset)
    bad = {error.key: error for _, error in row.errors}
    assert set(bad) == {f"s/s-000001/good{n:03d}" for n in (7, 8, 9)} and len(row.keys) == 17
    assert all(error.reason == "missing_shard" and "s-000001.tar" in error.detail for error in bad.values())
    assert [use.error is not None for use in row.uses] == [n in (7, 8, 9) for n in range(20)]


def test_a_jpeg_cut_behind_its_header_is_dropped_by_key(tmp_path, encoder):
    broken = jpeg()[: len(jpeg()) // 2]
    catalog = open_data(tmp_path, [*GOOD, ("torn", record(), {"0.png": broken})], encoder)
    assert not list(catalog.errors()), "its header is whole, so the index takes it"
    ((source, error),) = row_of(catalog, RowDataset(catalog, encoder), range(21)).errors
    assert (source, error.key, error.reason) == ("s", "s/s-000004/torn", "unreadable_image")
    assert "truncated" in error.detail


def test_a_member_that_is_not_there_is_dropped_by_key(tmp_path, encoder):
    two = record(images=2, shown=2)
    catalog = open_data(tmp_path, [*GOOD, ("half", two, {"0.png": png()})], encoder)
    ((number, error),) = catalog.errors()
    assert (number, error.key, error.reason) == (20, "s/s-000004/half", "missing_media") and "1.png" in error.detail
    assert sorted(key for _, rows in load(RowDataset(catalog, encoder)) for row in rows for key in row.keys) == sorted(
        2 * [f"s/s-{n // 5:06d}/{key}" for n, (key, _, _) in enumerate(GOOD)]
    )


def test_a_record_that_was_overwritten_since_is_dropped_by_key(found, encoder):
    row, shard = found.index_row(0, 1), found.shards[0].location
    member = next(member for member in row["members"] if member["name"] == "json")
    with shard.open("r+b") as file:
        file.seek(member["offset"])
        file.write(b"x" * member["size"])
    ((_, error),) = row_of(found, RowDataset(found, encoder)).errors
    assert (error.key, error.reason) == ("s/s-000000/good001", "bad_record")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_takes_its_samples_alone(found, encoder, workers):
    whole = list(load(RowDataset(found, encoder)))
    found.shards[2].location.unlink()
    left = list(load(RowDataset(found, encoder), workers))
    bad = errors(left)
    assert {error.key for error in bad} == {f"s/s-000002/good{n:03d}" for n in range(10, 15)} and len(bad) == 10
    assert {error.reason for error in bad} == {"missing_shard"} and "s-000002.tar" in bad[0].detail
    for (step, rows), (step_left, rows_left) in zip(whole, left, strict=True):
        assert step.number == step_left.number
        for row, row_left in zip(rows, rows_left, strict=True):
            assert [key for key in row.keys if "/s-000002/" not in key] == list(row_left.keys)


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


def test_slow_storage_changes_nothing_but_time_and_workers_hide_it(found, encoder, storage):
    expected = digests(load(RowDataset(found, encoder)))
    assert storage.reads >= 80
    storage.before = lambda path: time.sleep(0.05)
    start = time.monotonic()
    assert digests(load(RowDataset(found, encoder), workers=4)) == expected
    assert time.monotonic() - start < 0.05 * storage.reads


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_fails_is_named_and_counted_and_what_comes_after_is_whole(found, encoder, storage, workers):
    expected = list(load(RowDataset(found, encoder)))

    def fail(path):
        if path.stem == "s-000003":
            raise OSError(errno.EACCES, "Permission denied", str(path))

    storage.before = fail
    left = list(load(RowDataset(found, encoder), workers))
    bad = errors(left)
    assert {error.key for error in bad} == {f"s/s-000003/good{n:03d}" for n in range(15, 20)}
    assert all("s-000003.tar" in error.detail and "Permission denied" in error.detail for error in bad)
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


def test_storage_that_fails_for_ever_stops_the_run_and_names_the_shard(found, encoder, storage, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def fail(path):
        if path.stem == "s-000003":
            raise OSError(errno.EIO, "Input/output error", str(path))

    storage.before = fail
    with pytest.raises(StorageError, match=r"s-000003\.tar: 6 attempts .*Input/output error"):
        list(load(RowDataset(found, encoder)))


class Poisoned(RowDataset):
    """Its worker is killed when it makes the row `poison`, `times` times; a file counts."""

    poison: int
    times: int
    counter: Path

    def make(self, task, allocate):
        if task.row == self.poison and self.counter.stat().st_size < self.times:
            with self.counter.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().make(task, allocate)


def poisoned(found, encoder, folder, times, row=5):
    dataset = Poisoned(found, encoder)
    dataset.poison, dataset.times, dataset.counter = row, times, folder / "kills"
    dataset.counter.touch()
    return dataset


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_rows_are_the_same(found, encoder, caplog):
    expected = digests(load(RowDataset(found, encoder)))
    seen = []
    for _, rows in load(RowDataset(found, encoder), workers=2):
        seen += map(digest, rows)
        if len(seen) == 4:
            worker = multiprocessing.active_children()[0]
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
    assert seen == expected and len(expected) > 8
    assert "starting the workers again (1 of 3)" in caplog.text


@pytest.mark.slow
def test_a_row_that_kills_its_worker_each_time_stops_with_its_step_and_samples(found, encoder, tmp_path, caplog):
    dataset = poisoned(found, encoder, tmp_path, times=99)
    seen = []
    with pytest.raises(
        ValueError, match=r"died 4 times before step 2 was made .*data\.num_workers.*on rank 0: s/"
    ) as e:
        for _, rows in load(dataset, workers=1):
            seen += rows
    assert [row.row for row in seen] == [0, 1, 2, 3] or len(seen) == 4
    assert caplog.text.count("starting the workers again") == MAX_RESTARTS
    doomed = next(
        step
        for step in steps(found, plan_config(found, max_length=64, rows_per_step=2, num_epochs=2))
        if step.number == 2
    )
    keys = {found.key(*found.locate(number)) for row in doomed.rows for number in row.tolist()}
    assert all(key in str(e.value) for key in keys) and keys


def test_an_error_in_a_worker_is_no_death_and_is_raised_at_once(found, encoder, caplog):
    class Broken(RowDataset):
        def make(self, task, allocate):
            raise RuntimeError("a defect")

    others = set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="a defect") as held:
        list(load(Broken(found, encoder), workers=2))
    assert "starting the workers again" not in caplog.text
    assert held.tb and soon_none_but(others), "workers that ignore SIGTERM would keep Python from ending"


def test_no_worker_is_left_when_the_rows_are_closed_in_the_middle(found, encoder):
    others = set(multiprocessing.active_children())
    rows = iter(load(RowDataset(found, encoder), workers=2))
    next(rows)
    assert len(set(multiprocessing.active_children()) - others) == 2
    rows.close()
    assert soon_none_but(others)


def soon_none_but(others):
    """Whether within seconds no child process is left but these."""
    deadline = time.monotonic() + 10
    while (left := set(multiprocessing.active_children()) - others) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left
