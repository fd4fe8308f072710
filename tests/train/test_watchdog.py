"""A run that is stuck: who is named, what is left to look at, and how it ends."""

import re
import sys
import time
from dataclasses import replace

import pytest
import torch.distributed

from eagle_train import slurm
from eagle_train.train.exit_codes import STALLED
from eagle_train.train.heartbeat import Heart
from eagle_train.train.stalls import SAME_STEP, Sighting, is_old, laggards, waits_for_others, who_is_behind
from eagle_train.train.watchdog import (
    ALARM,
    MAX_KEYS,
    RECORD_BYTES,
    REPORT,
    Limits,
    Watchdog,
    as_record,
    new_folder,
    read_sightings,
)
from tests.runs import overrides, run_ranks

SEEN = Sighting(
    rank=0,
    host="h",
    node="",
    pid=1,
    phase="row",
    step=7,
    number=40,
    seconds=9.0,
    time=0.0,
    keys=["k"],
    where="x.py:1 f",
    waits=False,
    answers=True,
)


def ranks(*changes):
    return [replace(SEEN, rank=rank, **change) for rank, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("seen", "named", "why"),
    [
        (ranks({}, {"number": 39, "phase": "data"}, {}), [1], "are behind"),
        (ranks({"waits": True}, {"waits": False}, {"waits": True}), [1], "not in a collective"),
        (ranks({}, {"number": 39}, {"answers": False}), [2], "do not answer"),
        (ranks({"waits": True}, {"waits": True}), [0, 1], "at the same point"),
        (ranks({}), [0], "at the same point"),
    ],
)
def test_who_is_behind_is_named(seen, named, why):
    behind, reason = laggards(seen)
    assert [sighting.rank for sighting in behind] == named
    assert why in reason


def test_a_report_tells_rank_phase_step_samples_and_who_was_never_heard_of():
    text = who_is_behind(ranks({}, {"number": 3, "phase": "data", "keys": ["one", "two"]}), world_size=4)
    assert "rank 1 (host h, pid 1): 9 s in phase data of step 7, at x.py:1 f; samples: one, two" in text
    assert "never heard of: ranks 2, 3" in text


def test_a_thread_in_torchs_collectives_waits_for_others():

    assert not waits_for_others(sys._getframe())
    code = compile("import sys; seen = sys._getframe()", torch.distributed.__file__, "exec")
    names = {}
    exec(code, names)
    assert waits_for_others(names["seen"])


def test_the_first_step_of_a_stage_has_the_limit_of_the_start():
    heart, limits = Heart(), Limits(start_seconds=100, step_seconds=5, save_seconds=50)

    def limit(phase, step=0):
        heart.beat(phase, step)
        return limits.of(heart.now.phase, first=heart.now.first)

    assert [limit(phase) for phase in ("start", "data", "agree", "row", "update")] == [100] * 5
    assert [limit(phase) for phase in ("log", "save")] == [100, 50]
    assert [limit(phase, 1) for phase in ("data", "agree", "row", "row", "save", "data")] == [5, 5, 5, 5, 50, 5]
    assert limit("start", 2) == limit("data", 2) == 100, "the next stage"


def test_a_beat_costs_less_than_a_tenth_of_a_millisecond():
    heart = Heart()
    best = []
    for _ in range(5):
        started = time.perf_counter()
        for step in range(1000):
            heart.beat("row", step, ("a", "b"))
        best.append((time.perf_counter() - started) / 1000)
    assert min(best) < 1e-4


def test_a_good_end_leaves_nothing_and_a_new_start_deletes_what_a_killed_one_left(tmp_path):
    killed, stuck = new_folder(tmp_path), new_folder(tmp_path)
    assert not killed.exists(), "nothing was left in it"
    (stuck / ALARM).touch()
    folder = new_folder(tmp_path)
    watchdog = Watchdog(folder, Heart(), Limits(step_seconds=0.3))
    deadline = time.monotonic() + 30
    while not read_sightings(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_sightings(folder)[0].phase == "start"
    watchdog.close()
    assert not folder.exists() and stuck.exists()


def test_a_record_has_its_size_whatever_the_keys(tmp_path):
    sighting = replace(SEEN, keys=[f"source/shard/{'k' * 400}{number}" for number in range(MAX_KEYS)])
    (tmp_path / "rank-00000.json").write_bytes(as_record(sighting))
    (read,) = read_sightings(tmp_path)
    assert (tmp_path / "rank-00000.json").stat().st_size == RECORD_BYTES == len(as_record(SEEN))
    assert 5 < len(read.keys) < MAX_KEYS and read.keys == sighting.keys[: len(read.keys)]


def test_a_job_stuck_in_the_same_step_again_and_again_is_held(tmp_path, monkeypatch):
    for start in range(SAME_STEP):
        assert not is_old(tmp_path, REPORT, 12)
        (tmp_path / f"start-{start}").mkdir()
        (tmp_path / f"start-{start}" / REPORT).write_text("rank 1 ...\nstep 12\n")
    assert is_old(tmp_path, REPORT, 12) and not is_old(tmp_path, REPORT, 13)
    asked = []
    monkeypatch.setattr(slurm, "command", lambda words: asked.append(words) or "JobId=7 JobState=RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.requeue(hold=True) and asked[-1] == ["scontrol", "requeuehold", "7"]


def reports(folder):
    """Returns the report of a stuck run and the stacks of its ranks."""
    (start,) = (folder / "watchdog").iterdir()
    return (start / REPORT).read_text(), [path.read_text() for path in sorted(start.glob("*.stacks"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "culprit", "phase", "sample"),
    [("row", 1, "row", "sample-1-2"), ("collective", 0, "row", "sample-0-2")],  # `loader` below is stuck for data
)
def test_the_rank_the_others_wait_for_is_named(tmp_path, case, culprit, phase, sample):
    ends = run_ranks([case, str(tmp_path)], 2, "tests.stuck_ranks")
    assert [code for code, _ in ends] == [STALLED] * 2, ends
    report, stacks = reports(tmp_path)
    assert f"rank {culprit} (" in report and f"rank {1 - culprit} (" not in report
    assert f"in phase {phase} of step 2" in report and f"samples: {sample}" in report
    assert "sleep_in" in stacks[culprit], "where it slept"
    assert "torch/distributed" in stacks[1 - culprit], "where the other waited"
    assert sum(report.splitlines()[0] in said for _, said in ends) == 1, "one rank says it"


@pytest.mark.slow
def test_a_rank_that_holds_pythons_lock_is_named_and_ended(tmp_path):
    ends = run_ranks(["lock", str(tmp_path)], 2, "tests.stuck_ranks")
    assert [code for code, _ in ends] == [STALLED, 1], ends
    report, stacks = reports(tmp_path)
    assert "do not answer" in report and "rank 1 (" in report and "rank 0 (" not in report
    assert "Timeout" in stacks[1] and "sleep_in" in stacks[1]


@pytest.mark.slow
def test_a_rank_that_cannot_raise_the_alarm_ends_all_the_same(tmp_path):
    ((code, said),) = run_ranks(["storage", str(tmp_path)], 1, "tests.stuck_ranks", timeout=60)
    assert code == 1 and "watchdog of rank 0: FileNotFoundError" in said


def test_a_collective_waits_for_longer_than_any_rank_may_take():
    limits = Limits(start_seconds=7.0, step_seconds=30.0, save_seconds=50.0, evaluate_seconds=20.0, answer_seconds=2.0)
    assert limits.interval == 1.0 and limits.collective_seconds == 50 + 2 * (6 * 1 + 2 * 2)


@pytest.mark.slow
def test_no_group_of_a_run_gives_up_before_the_watchdog(data, tmp_path):
    """Also not DeepSpeed's own, which it makes without a time-out: 10 minutes under NCCL."""
    limits = [f"watchdog.{name}_seconds=4000" for name in ("start", "step", "save", "evaluate")]
    arguments = ["groups", "-", *overrides(data, tmp_path / "run", "engine=zero2", *limits)]
    ((code, said),) = run_ranks(arguments, 1, "tests.stuck_ranks")
    waits = re.search(r"^waits: (.*)$", said, re.MULTILINE)
    assert code == 0 and waits, said
    found = [float(wait) for wait in waits[1].split()]
    assert len(found) > 1 and set(found) == {4000.0 + 2 * (6 * 30 + 2 * 30)}


def stuck_run(data, run, case, limit):
    """Returns the report and the stacks of a run whose rank 1 gets stuck, having seen that it is named and both end."""
    limits = [limit, "watchdog.answer_seconds=10", "schedule.pretrain.rows_per_step=2"]
    ends = run_ranks([case, "-", *overrides(data, run, *limits)], 2, "tests.stuck_ranks")
    assert [code for code, _ in ends] == [STALLED] * 2, ends
    report, stacks = reports(run)
    assert "rank 1 (" in report and "rank 0 (" not in report
    return report, stacks


@pytest.mark.slow
def test_a_loader_that_hangs_ends_the_run_with_its_samples_named(data, tmp_path):
    report, _ = stuck_run(data, tmp_path / "run", "loader", "watchdog.step_seconds=10")
    assert "in phase data of step 2" in report and "samples: small_" in report


@pytest.mark.slow
def test_a_rank_that_gets_no_weights_ends_the_run(data, tmp_path):
    report, stacks = stuck_run(data, tmp_path / "run", "construction", "watchdog.start_seconds=15")
    assert "in phase start of step 0" in report
    assert re.search("in stuck$", stacks[1], re.MULTILINE) and "torch/distributed" in stacks[0]
