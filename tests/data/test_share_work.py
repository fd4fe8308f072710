"""Ranks make files together: each file once, none lost with a killed process, and no error is a dead-lock."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest

from eagle_train.data import share_work as module
from eagle_train.data.share_work import Claims, Patience, claim_path, machine, share_work

PATIENCE = Patience(poll=0.05, beat=0.1, stale=1.0)
RANK = """
import sys
from pathlib import Path
from tests.data.test_share_work import run_rank
run_rank(Path(sys.argv[1]), *map(int, sys.argv[2:5]), float(sys.argv[5]))
"""


def make(path: Path, seconds: float = 0.0) -> None:
    """Makes a file, and notes who did."""
    with (path.parent / "log").open("a") as log:
        log.write(f"{path.name} {os.getpid()}\n")
    time.sleep(seconds)
    if path.name.startswith("bad"):
        raise OSError("the disk is on fire")
    if path.name.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.write_text(path.name)
    aside.replace(path)


def is_done(path: Path, item: Path) -> bool:
    return path.exists()


def outputs(folder: Path, count: int) -> dict[Path, Path]:
    return {folder / f"out-{number:03d}": folder / f"out-{number:03d}" for number in range(count)}


def run_rank(folder: Path, rank: int, world_size: int, count: int, seconds: float) -> None:
    """Is what a rank does in the tests of several processes."""
    items = outputs(folder, count)
    share_work(items, partial(make, seconds=seconds), is_done, rank=rank, world_size=world_size, patience=PATIENCE)
    assert all(path.read_text() == path.name for path in items)


def start_rank(folder: Path, rank: int, world_size: int, count: int, seconds: float) -> subprocess.Popen:
    arguments = [str(value) for value in (folder, rank, world_size, count, seconds)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", RANK, *arguments],
        cwd=Path(__file__).parents[2],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def log(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_claim(path: Path, holder: str) -> Path:
    claim_path(path).write_text(holder)
    return claim_path(path)


def clean(folder: Path, count: int) -> bool:
    """Returns whether there are the outputs and nothing else."""
    return sorted(file.name for file in folder.iterdir() if file.name != "log") == [
        path.name for path in outputs(folder, count)
    ]


def test_one_process_makes_what_is_missing_and_reports_it(tmp_path):
    items = outputs(tmp_path, 6)
    make(tmp_path / "out-002")
    counts = []
    share_work(items, make, is_done, progress=counts.append, patience=PATIENCE)
    assert counts[0] == 1 and sum(counts) == 6 and clean(tmp_path, 6)
    share_work(items, make, is_done, progress=counts.append, patience=PATIENCE)
    assert counts[-1] == 6 and Counter(name for name, _ in log(tmp_path)).most_common(1)[0][1] == 1


def test_nothing_is_written_where_nothing_is_missing(tmp_path):
    items = outputs(tmp_path, 3)
    share_work(items, make, is_done, patience=PATIENCE)
    tmp_path.chmod(0o500)
    before = tmp_path.stat().st_mtime_ns
    share_work(items, make, is_done, patience=PATIENCE)
    tmp_path.chmod(0o700)
    assert tmp_path.stat().st_mtime_ns == before


def test_ranks_begin_apart(tmp_path):
    items = outputs(tmp_path, 8)
    share_work(items, make, is_done, rank=1, world_size=2, patience=PATIENCE)
    assert [name for name, _ in log(tmp_path)] == [f"out-{number:03d}" for number in (4, 5, 6, 7, 0, 1, 2, 3)]


@pytest.mark.slow
def test_several_processes_make_each_file_once(tmp_path):
    ranks = [start_rank(tmp_path, rank, 3, 30, 0.05) for rank in range(3)]
    for process in ranks:
        finish(process)
    made = log(tmp_path)
    assert sorted(name for name, _ in made) == [path.name for path in outputs(tmp_path, 30)]
    assert len({pid for _, pid in made}) >= 2 and clean(tmp_path, 30)


def test_a_rank_helps_with_what_others_never_begin(tmp_path):
    share_work(outputs(tmp_path, 9), make, is_done, rank=2, world_size=3, patience=PATIENCE)
    assert clean(tmp_path, 9)


def test_the_claim_of_a_killed_process_is_taken_over_at_once(tmp_path):
    killed = start_rank(tmp_path, 0, 2, 4, 60.0)  # would sleep for a minute over its first file
    wait_for(lambda: claim_path(tmp_path / "out-000").exists() and (tmp_path / "log").exists())
    killed.kill()  # nobody waits for it yet: it is a zombie
    wait_for(lambda: psutil.Process(killed.pid).status() == psutil.STATUS_ZOMBIE)
    assert claim_path(tmp_path / "out-000").exists()
    began = time.monotonic()
    patient = Patience(poll=0.05, beat=0.1, stale=1000.0)
    share_work(outputs(tmp_path, 4), make, is_done, rank=1, world_size=2, patience=patient)
    assert time.monotonic() - began < 10 and clean(tmp_path, 4)
    killed.communicate()


@pytest.mark.slow
def test_a_claim_of_another_machine_is_taken_over_when_it_is_silent(tmp_path):
    leave_claim(tmp_path / "out-001", f"elsewhere {os.getpid()} token")
    began = time.monotonic()
    share_work(outputs(tmp_path, 2), make, is_done, patience=PATIENCE)
    assert PATIENCE.stale < time.monotonic() - began < 10 and clean(tmp_path, 2)


@pytest.mark.slow
def test_a_claim_that_is_touched_is_respected_however_old_its_clock(tmp_path):
    path = tmp_path / "out"
    claim = leave_claim(path, "elsewhere 1 token")
    claims = Claims(PATIENCE)
    end = time.monotonic() + 2 * PATIENCE.stale
    number = 0
    while time.monotonic() < end:
        number += 1
        os.utime(claim, ns=(number, number))  # of 1970
        assert claims.is_held(path) and not claims.take(path)
        time.sleep(0.05)


def test_the_holder_touches_its_claims(tmp_path):
    with Claims(PATIENCE) as claims:
        assert claims.take(tmp_path / "out")
        claim = claim_path(tmp_path / "out")
        os.utime(claim, ns=(0, 0))
        wait_for(lambda: claim.stat().st_mtime_ns > 0)
        assert not Claims(PATIENCE).take(tmp_path / "out"), "of a process that lives"
    assert not claim.exists()


@pytest.mark.slow
def test_a_number_of_a_dead_process_that_another_has_now_does_not_hold_forever(tmp_path):
    leave_claim(tmp_path / "out-000", f"{machine()} {os.getppid()} token")
    share_work(outputs(tmp_path, 1), make, is_done, patience=PATIENCE)
    assert clean(tmp_path, 1)


def test_who_lost_a_claim_does_not_remove_its_new_holder_s(tmp_path):
    with Claims(PATIENCE) as claims:
        claims.take(tmp_path / "out")
        leave_claim(tmp_path / "out", "elsewhere 1 token")
    assert claim_path(tmp_path / "out").read_text() == "elsewhere 1 token"


def test_a_claim_that_another_took_over_since_we_looked_stays_its_own(tmp_path, monkeypatch):
    path, others = tmp_path / "out", Claims(PATIENCE)
    leave_claim(path, f"{machine()} {dead_pid()} token")
    judge = Claims._is_left_behind

    def slow_judge(self, claim, content):
        left_behind = judge(self, claim, content)
        if self is not others:
            assert left_behind and others.take(path)
        return left_behind

    monkeypatch.setattr(Claims, "_is_left_behind", slow_judge)
    assert not Claims(PATIENCE).take(path)
    assert sorted(tmp_path.iterdir()) == [claim_path(path)]
    others.give_back(path)
    assert not claim_path(path).exists(), "it is still the claim of who took it over"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_its_file_on_every_rank_and_leaves_no_claim(tmp_path, workers):
    items = outputs(tmp_path, 3) | {tmp_path / "bad-1": tmp_path / "bad-1"}
    for rank in range(2):
        with pytest.raises(ValueError, match=r"bad-1 failed: .*the disk is on fire"):
            share_work(items, make, is_done, rank=rank, world_size=2, workers=workers, patience=PATIENCE)
        assert not list(tmp_path.glob("*.claim"))
    if workers == 1:  # processes may not have come to the others
        assert all(path.exists() for path in outputs(tmp_path, 3)), "what is published stays"


def test_worker_processes_share_the_files_of_a_rank(tmp_path):
    counts = []
    seconds = partial(make, seconds=0.05)
    share_work(outputs(tmp_path, 12), seconds, is_done, workers=2, progress=counts.append, patience=PATIENCE)
    made = log(tmp_path)
    assert len(made) == sum(counts) == 12 and clean(tmp_path, 12)
    assert len({pid for _, pid in made}) == 2 and str(os.getpid()) not in {pid for _, pid in made}


def test_a_worker_that_is_killed_is_an_error_with_the_name_of_the_file(tmp_path):
    items = {tmp_path / "deadly": tmp_path / "deadly", tmp_path / "out-000": tmp_path / "out-000"}
    with pytest.raises(ValueError, match=r"deadly failed: the process at work on it was ended by SIGKILL"):
        share_work(items, make, is_done, workers=2, patience=PATIENCE)
    assert not list(tmp_path.glob("*.claim"))


def test_an_unwritable_folder_names_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "out"
    with pytest.raises(ValueError, match="set index_dir to a writable folder"):
        share_work({path: path}, make, lambda path, item: False, patience=PATIENCE)


def test_what_another_made_since_we_looked_is_not_made_again(tmp_path, monkeypatch):
    take = module.Claims.take

    def slow_take(self, path):
        make(path)  # by another, before our claim
        return take(self, path)

    monkeypatch.setattr(module.Claims, "take", slow_take)
    share_work(outputs(tmp_path, 2), make, is_done, patience=PATIENCE)
    assert len(log(tmp_path)) == 2 and clean(tmp_path, 2)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_who_is_told_to_stop_finishes_what_was_begun_and_leaves_the_rest(tmp_path, workers):
    items = {tmp_path / f"f{n}": tmp_path / f"f{n}" for n in range(6)}
    made = []
    share_work(
        items,
        make,
        lambda path, item: path.exists(),
        workers=workers,
        progress=made.append,
        stop=lambda: sum(made) >= 2,
        patience=PATIENCE,
    )
    done = [path for path in items if path.exists()]
    assert 2 <= len(done) < 6 and sum(made) == len(done)
    assert not any(claim_path(path).exists() for path in items)
    share_work(items, make, lambda path, item: path.exists(), patience=PATIENCE)
    assert all(path.exists() for path in items)
