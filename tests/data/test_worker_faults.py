"""Workers of the loader that die or fail: the rows stay the same, or the run stops with the step and its samples."""

import multiprocessing
import os
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest

from eagle_train.data import step_loader
from eagle_train.data.loader import RowDataset
from eagle_train.data.replay import digest
from eagle_train.data.stream import steps
from tests.catalogs import plan_config
from tests.data.loads import digests, load, open_data, tiny_encoder
from tests.data.test_bad_samples import GOOD

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.fixture(scope="module")
def encoder(data):
    return tiny_encoder(data)


@pytest.fixture
def found(tmp_path, encoder):
    """The catalog of 20 good samples in 4 shards."""
    return open_data(tmp_path, GOOD, encoder)


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
def test_a_row_that_kills_its_worker_each_time_stops_with_its_step_and_samples(
    found, encoder, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(step_loader, "MAX_RESTARTS", 1)  # torch takes five seconds to notice a death
    dataset = poisoned(found, encoder, tmp_path, times=99)
    seen = []
    with pytest.raises(
        ValueError, match=r"died 2 times before step 2 was made .*data\.num_workers.*on rank 0: s/"
    ) as e:
        for _, rows in load(dataset, workers=1):
            seen += rows
    assert [row.row for row in seen] == [0, 1, 2, 3] or len(seen) == 4
    assert caplog.text.count("starting the workers again") == 1
    doomed = next(
        step
        for step in steps(found, plan_config(found, max_length=64, rows_per_step=2, num_epochs=2))
        if step.number == 2
    )
    keys = {found.key(*found.locate(number)) for row in doomed.rows for number in row.tolist()}
    assert all(key in str(e.value) for key in keys) and keys


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_step_that_is_done_with_is_freed_by_the_thread_that_collects(found, encoder):
    """To free it takes turns of Python's lock, for which the one who trains would wait."""
    freed = []
    for _, rows in load(RowDataset(found, encoder), workers=1):
        for row in rows:
            weakref.finalize(row.pixels, lambda: freed.append(threading.current_thread().name))
        del rows, row
    assert len(freed) > 8 and set(freed[:-4]) == {"ahead"}
