"""Saving while training goes on, and what becomes of saves that fail."""

import resource
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from eagle_train.track.goodput import Goodput
from eagle_train.train import saving
from eagle_train.train.app import train
from eagle_train.train.checkpoint import CheckpointDir
from eagle_train.train.engine import PlainEngine
from eagle_train.train.load import read_checkpoint_weights
from eagle_train.train.optim import freeze
from eagle_train.train.retention import Retention
from eagle_train.train.saving import Saver
from eagle_train.train.schedule import Stage
from tests.runs import config, run_ranks
from tests.toys import tiny_model, tiny_row, tiny_sample, weighted_loss

FILES = {"state.json": b"{}"}


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def make_engine():
    model = tiny_model()
    rates = {"mixture": 1e-2, "projector": 1e-2, "llm": 1e-2}
    stage = Stage(recipe="x", learning_rates=rates, max_length=64, rows_per_step=1, num_steps=9, warmup_ratio=0.0)
    freeze(model, rates)
    return PlainEngine(model, stage, 1)


def train_step(engine):
    """Takes a step."""
    engine.backward(weighted_loss(engine.model, [tiny_row([tiny_sample(0, tiles=1)])]), last=True)
    engine.step(1.0)


def weights(engine):
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def saved_weights(saver, step):
    return dict(read_checkpoint_weights(saver.checkpoints.path(step)))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def held(monkeypatch):
    """Holds writers back until it is set; they wait for it half a minute."""
    write, gate = saving.write_pieces, threading.Event()

    def wait(folder, pieces):
        assert gate.wait(30)
        return write(folder, pieces)

    monkeypatch.setattr(saving, "write_pieces", wait)
    return gate


@contextmanager
def small_files(limit):
    """Lets the kernel refuse files of more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_written_in_the_background_is_the_state_of_the_call(tmp_path, engine, held):
    saver = Saver(CheckpointDir(tmp_path), background=True)
    before = weights(engine)
    report = saver.save(engine, 1, FILES, wait=False)
    assert report.background and not report.published and saver.writing()
    train_step(engine)  # while nothing is written yet
    assert saver.poll() is None and saver.checkpoints.published() == []
    held.set()
    deadline = time.monotonic() + 30
    while saver.poll() is None:
        assert time.monotonic() < deadline
    assert report.published and report.write_seconds > 0 and report.trouble is None and saver.last is report
    assert same(saved_weights(saver, 1), before) and not same(before, weights(engine))
    assert saver.poll() is None and not saver.writing(), "nothing is being written any more"


def test_the_loop_stalls_for_the_copy_alone(tmp_path, engine, held):
    saver = Saver(CheckpointDir(tmp_path), background=True)
    begun = saver.save(engine, 1, FILES, wait=False)
    assert not begun.published and not held.is_set()  # it came back while nothing could be written
    threading.Timer(0.3, held.set).start()
    report = saver.finish()
    assert report.write_seconds > 0.2 and report.seconds == report.stall_seconds + report.write_seconds
    assert report.metrics()["time/checkpoint_stall_seconds"] == report.stall_seconds


def test_publishing_between_steps_is_a_standstill_too(tmp_path, engine, monkeypatch):
    now, inside = [0.0], []
    monkeypatch.setattr(saving.time, "perf_counter", lambda: now[0])

    class Slow(CheckpointDir):
        def publish(self, *arguments):
            inside.append(bool(standing))
            now[0] += 100.0
            return super().publish(*arguments)

    standing = []

    @contextmanager
    def standstill():
        standing.append(True)
        yield
        standing.pop()

    saver = Saver(Slow(tmp_path), background=True)
    begun = saver.save(engine, 1, FILES, wait=False)
    assert begun.stall_seconds == 0.0
    saver._write.join()
    report = saver.poll(standstill)
    assert report.published and inside == [True] and not standing
    assert report.stall_seconds == report.seconds == 100.0


@pytest.mark.slow
def test_a_run_counts_publishing_as_a_stall_of_a_checkpoint(data, tmp_path, monkeypatch):
    books, phases = [], []
    poll, publish = Saver.poll, CheckpointDir.publish

    class Book(Goodput):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            books.append(self)

    def join_and_poll(self, *arguments):
        if self._write is not None:
            self._write.join()  # so that it is published here and not by the next save
        return poll(self, *arguments)

    def look(self, *arguments):
        phases.append(books[0]._phases[-1])
        return publish(self, *arguments)

    monkeypatch.setattr("eagle_train.train.app.Goodput", Book)
    monkeypatch.setattr(Saver, "poll", join_and_poll)
    monkeypatch.setattr(CheckpointDir, "publish", look)
    assert train(config(data, tmp_path, "async_save=true", "schedule.sft.num_steps=3"))
    assert len(phases) > 2 and set(phases) == {"checkpoint"}


def test_the_next_save_finishes_the_one_before(tmp_path, engine, held):
    saver = Saver(CheckpointDir(tmp_path), background=True)
    first = saver.save(engine, 1, FILES, wait=False)
    threading.Timer(0.3, held.set).start()
    second = saver.save(engine, 2, FILES, wait=False)
    assert first.published and second.before is first and second.stall_seconds > 0.2
    assert saver.finish() is second and second.published and saver.finish() is None
    assert [path.name for path in saver.checkpoints.published()] == ["step-00000001", "step-00000002"]


def test_a_save_that_is_waited_for_is_published_when_the_call_returns(tmp_path, engine):
    saver = Saver(CheckpointDir(tmp_path, Retention(last=1)), background=True)
    for step in (1, 2):
        report = saver.save(engine, step, FILES)
        assert report.published and not report.background and saver.checkpoints.latest() == saver.checkpoints.path(step)
        assert report.seconds == report.stall_seconds >= report.write_seconds > 0
    assert saver.checkpoints.published() == [saver.checkpoints.path(2)], "what the retention does not keep is gone"


@pytest.mark.parametrize(("free", "background"), [(1 << 40, True), (0, False)])
def test_without_memory_for_a_copy_training_waits(tmp_path, engine, monkeypatch, free, background):
    monkeypatch.setattr("eagle_train.train.host_memory.free_bytes", lambda: free)
    saver = Saver(CheckpointDir(tmp_path))
    assert saver.save(engine, 1, FILES, wait=False).background == background
    saver.finish()
    assert saver.last.published


def test_a_change_between_saving_in_the_background_and_waiting_is_said_once(tmp_path, engine, monkeypatch, caplog):
    free = 1 << 40
    monkeypatch.setattr("eagle_train.train.host_memory.free_bytes", lambda: free)
    saver = Saver(CheckpointDir(tmp_path))
    saver._copy.missing = lambda pieces: 1 << 30
    for step, said in enumerate((0, 1, 1, 2, 2)):
        free = 0 if step in (1, 2) else 1 << 40
        assert saver.save(engine, step, FILES, wait=False).background == (free > 0)
        saver.finish()
        assert len(caplog.messages) == said
    copy = "in host memory for a copy of the state, 1.0 GiB more on rank 0: training"
    said = [f"no room {copy} stands still while it is saved", f"room {copy} goes on while it is saved"]
    assert caplog.messages == said


@pytest.mark.parametrize("background", [True, False])
def test_a_write_that_fails_leaves_nothing_and_training_goes_on(tmp_path, engine, background, caplog):
    saver = Saver(CheckpointDir(tmp_path), background=background, max_failures=2)
    assert saver.save(engine, 1, FILES).published
    with small_files(10_000):
        saver.save(engine, 2, FILES, wait=False)
        saver.finish()
    assert not saver.last.published and "rank 0: [Errno 27] File too large" in saver.last.trouble
    assert "the checkpoint of step 2 could not be saved" in caplog.text and "failure 1 in a row of 2" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert saver.save(engine, 3, FILES).published and saver.failures == 0
    assert same(saved_weights(saver, 3), weights(engine))


def test_a_full_disk_keeps_the_last_checkpoint_and_frees_what_it_took(tmp_path, engine):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 4 * sum(p.nbytes for p in engine.model.parameters())  # one checkpoint, not two
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        saver = Saver(CheckpointDir(disk / "checkpoints", Retention(last=1)))
        assert saver.save(engine, 1, FILES).published
        report = saver.save(engine, 2, FILES)
        assert not report.published and "No space left on device" in report.trouble
        assert [path.name for path in saver.checkpoints.folder.iterdir()] == ["step-00000001"]
        assert saver.checkpoints.latest() == saver.checkpoints.path(1)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_place_that_nobody_may_write_to_ends_the_run_after_the_allowed_failures(engine, caplog):
    saver = Saver(CheckpointDir(Path("/proc/no")), background=True, max_failures=1)
    assert not saver.save(engine, 1, FILES, wait=False).published
    with pytest.raises(OSError, match=r"step 2 could not be saved .*max_failed_saves=1 allows no more: make room"):
        saver.save(engine, 2, FILES)
    assert "failure 1 in a row of 1" in caplog.text


def test_a_copy_that_does_not_fit_is_a_save_that_failed(tmp_path, engine, monkeypatch):
    def full(self, pieces):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    saver = Saver(CheckpointDir(tmp_path), background=True)
    monkeypatch.setattr(saving.HostCopy, "fill", full)
    saver.save(engine, 1, FILES, wait=False)
    report = saver.poll()
    assert "no copy in host memory: DefaultCPUAllocator" in report.trouble and list(tmp_path.iterdir()) == []


def test_a_defect_of_the_writer_is_raised_not_counted(tmp_path, engine, monkeypatch):
    def wrong(folder, pieces):
        raise KeyError("a defect")

    monkeypatch.setattr(saving, "write_pieces", wrong)
    saver = Saver(CheckpointDir(tmp_path), background=True)
    saver.save(engine, 1, FILES, wait=False)
    with pytest.raises(KeyError, match="a defect"):
        saver.finish()


def test_a_checkpoint_that_cannot_be_published_is_removed(tmp_path, engine, monkeypatch):
    def fail(folder, files):
        raise OSError(28, "No space left on device")

    saver = Saver(CheckpointDir(tmp_path))
    monkeypatch.setattr("eagle_train.train.checkpoint.write_manifest", fail)
    report = saver.save(engine, 1, FILES)
    assert "rank 0: [Errno 28] No space left" in report.trouble and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_in_the_middle_of_a_background_write_the_checkpoint_before_is_whole(tmp_path, engine, caplog):
    folder = tmp_path / "checkpoints"
    ((code, said),) = run_ranks([str(folder)], module="tests.killed_save")
    assert code == -signal.SIGKILL, said
    (half,) = (folder / "step-00000002.writing").iterdir()
    assert half.suffix == ".safetensors"
    saver = Saver(CheckpointDir(folder))
    assert saver.checkpoints.latest() == saver.checkpoints.path(1)
    assert "step-00000002.writing: it was never finished" in caplog.text
    assert saver.save(engine, 2, FILES).published
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
