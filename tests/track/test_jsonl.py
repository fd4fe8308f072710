"""metrics.jsonl: strict JSON, on disk line by line, each step once after a kill and a resume."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from eagle_train.track.jsonl import JsonlTracker, read_metrics


def write(path, steps, **options):
    tracker = JsonlTracker(path, **options)
    for step in steps:
        tracker.log({"train/loss": 1 / step, "stage": "sft"}, step)
    tracker.close()


def steps_of(path):
    return [record["step"] for record in read_metrics(path)]


def test_a_record_holds_step_time_and_metrics(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    before = time.time()
    write(path, [4])
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert before <= record.pop("time") <= time.time()
    assert record == {"step": 4, "train/loss": 0.25, "stage": "sft"}


def test_a_line_is_readable_before_the_file_is_closed(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        tracker.log({"train/loss": 0.5}, step)
        assert steps_of(tmp_path / "metrics.jsonl")[-1] == step
    tracker.close()


def test_values_that_are_not_finite_become_null_and_the_file_stays_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"a": float("nan"), "b": float("inf"), "c": -1.5}, 1)
    tracker.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert (record["a"], record["b"], record["c"]) == (None, None, -1.5)


def test_after_a_resume_each_step_is_there_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(6, 11), resume_step=5)
    assert steps_of(path) == list(range(1, 11))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_starting_from_step_0_drops_the_records_of_a_run_without_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 3), resume_step=0)
    assert steps_of(path) == [1, 2]


def test_without_a_resume_step_records_are_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    write(path, [2, 3])
    assert steps_of(path) == [1, 2, 2, 3]


@pytest.mark.parametrize("cut", [1, 2, 15])
def test_a_torn_last_line_is_skipped_and_does_not_spoil_the_next_one(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps_of(path) == [1, 2]
    write(path, [3], resume_step=5)
    assert steps_of(path) == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:9] + "\n" + lines[2])
    with pytest.raises(ValueError, match="line 2 of 3 is not JSON"):
        read_metrics(path)


def test_a_killed_process_keeps_all_lines_it_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, sys, signal, pathlib; from eagle_train.track.jsonl import JsonlTracker\n"
        f"tracker = JsonlTracker(pathlib.Path({str(path)!r}))\n"
        "for step in range(1, 51): tracker.log({'train/loss': 1.0}, step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == -signal.SIGKILL
    assert steps_of(path) == list(range(1, 51))
