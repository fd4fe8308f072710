"""W&B: offline unless logged in, one id over resumes, little lost by a kill."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest

from eagle_train.track.wandb_tracker import MISSED, SENT_AGAIN, choose_mode, logged_in, new_run_id, points_to_send

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from eagle_train.track.wandb_tracker import FLUSH_SECONDS, WandbTracker

tracker = WandbTracker(Path(sys.argv[1]), project="p", name="n", run_id="abcd1234", config={"seed": {"a": 1}})
for step in range(int(sys.argv[2]), int(sys.argv[3])):
    tracker.log({"train/loss": 1 / step, "stage": "sft"}, step)
if sys.argv[4] == "kill":
    time.sleep(2 * FLUSH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
tracker.log({"eval/exact_match/simple": 0.5}, step)
tracker.close(failed=sys.argv[4] == "fail")
"""


def clean_env(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    return kept | {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}


def records(folder):
    """What an offline run's folder holds."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_env(folder)).stdout
    return [json.loads(line) for line in shown.splitlines() if line.startswith("{")]


def history(folder):
    """The logged points of an offline run's folder."""
    return [record["history"]["item"] for record in records(folder) if record["type"] == "history"]


def exit_code(folder):
    """The code with which an offline run ended; zeros are not written."""
    (end,) = (record for record in records(folder) if record["type"] == "exit")
    return end["exit"].get("exit_code", 0)


@pytest.mark.slow
def test_an_offline_run_survives_a_kill_and_goes_on_under_its_id(tmp_path):
    def start(*arguments):
        command = [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path / "run"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=clean_env(tmp_path))

    killed, finished = start("1", "41", "kill"), start("36", "51", "close")
    assert (killed.returncode, finished.returncode) == (-signal.SIGKILL, 0), killed.stderr + finished.stderr
    assert finished.stdout == finished.stderr == "", "W&B is to keep quiet"
    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*-abcd1234"))
    steps = [point["global_step"] for point in history(first)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 39  # W&B holds the newest point back until the next step begins
    points = history(second)
    assert [point["global_step"] for point in points] == list(range(36, 51))
    assert [point["_step"] for point in points] == list(range(36, 51))
    assert points[-1]["eval/exact_match/simple"] == 0.5 and points[-1]["train/loss"] == 1 / 50
    # The server passes over points of steps that it has, as is the last one's after a resume: scores go there twice.
    updates = [record["summary"]["update"] for record in records(second) if record["type"] == "summary"]
    assert {"eval/exact_match/simple": 0.5} in updates
    failed = start("51", "52", "fail")
    assert (failed.returncode, failed.stderr) == (0, "")
    (third,) = set((tmp_path / "run" / "wandb").glob("offline-run-*-abcd1234")) - {first, second}
    assert [exit_code(folder) for folder in (second, third)] == [0, 1]


DIES = """
import logging, signal, sys, psutil
from pathlib import Path
from eagle_train.track import wandb_tracker
from eagle_train.track.jsonl import JsonlTracker
from eagle_train.track.wandb_tracker import WandbTracker

logging.basicConfig()
run, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
wandb_tracker.SENT_AGAIN = 2  # fewer than W&B misses
lines = JsonlTracker(run / "metrics.jsonl")
tracker = WandbTracker(run, project="p", name="n", run_id="abcd1234", config={})
for step in range(first, last):
    if step == 3:
        for process in psutil.Process().children(recursive=True):
            process.send_signal(signal.SIGTERM)  # as a scheduler does that ends a job
            process.wait(30)
    for one in (lines, tracker):
        one.log({"train/loss": 1 / step, "stage": "sft"}, step)
tracker.close()
print("closed")
"""


@pytest.mark.slow
def test_the_death_of_wandbs_process_ends_no_run_and_the_next_start_sends_what_it_missed(tmp_path):
    for steps in (("1", "6"), ("6", "8")):
        command = [sys.executable, "-c", DIES, str(tmp_path / "run"), *steps]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_env(tmp_path))
        assert done.returncode == 0 and done.stdout == "closed\n", done.stderr
        assert ("W&B is gone" in done.stderr) == (steps[0] == "1")
        assert (tmp_path / "run" / "wandb" / MISSED).exists() == (steps[0] == "1")
    _, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*-abcd1234"))
    assert [(point["global_step"], point["train/loss"]) for point in history(second)] == [
        (step, 1 / step) for step in range(1, 8)
    ]


def test_what_wandb_missed_is_sent_with_some_points_before_it():
    records = [{"step": step} for step in range(1, 1001)]
    assert points_to_send(records, None) == records[-SENT_AGAIN:]
    assert points_to_send(records, 1001) == records[-SENT_AGAIN:]
    assert points_to_send(records, 500) == records[499 - SENT_AGAIN :]
    assert points_to_send(records, 5) == points_to_send(records, 0) == records
    assert points_to_send([], 3) == []


@pytest.mark.slow
def test_a_start_that_cannot_reach_wandb_is_offline_and_ends_no_run(tmp_path):
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), "1", "4", "close"]
    env = clean_env(tmp_path) | away
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0 and "W&B cannot be reached" in done.stderr, done.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*-abcd1234")
    assert [point["global_step"] for point in history(folder)] == [1, 2, 3]


def test_the_import_of_wandb_waits_for_a_tracker(tmp_path):
    code = "import sys, eagle_train.track.wandb_tracker; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=clean_env(tmp_path)).returncode == 0


@pytest.mark.parametrize(
    ("mode", "env", "chosen"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": "k"}, "online"),
        (None, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "disabled"),
        ("online", {}, "online"),
    ],
)
def test_the_mode_is_the_argument_then_the_variable_then_the_login(tmp_path, mode, env, chosen):
    assert choose_mode(mode, {"HOME": str(tmp_path)} | env) == chosen


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="'ofline' is none of online, offline, disabled"):
        choose_mode("ofline", {})


def test_only_a_netrc_entry_of_the_host_counts_as_a_login(tmp_path):
    netrc = tmp_path / ".netrc"
    env = {"HOME": str(tmp_path)}
    assert not logged_in(env)
    netrc.write_text("machine example.org login user password key\n")
    assert not logged_in(env)
    netrc.write_text("machine api.wandb.ai login user password key\n")
    assert logged_in(env)
    assert not logged_in(env | {"WANDB_BASE_URL": "https://wandb.example.org"})
    netrc.write_text("machine wandb.example.org login user password key\n")
    assert logged_in(env | {"WANDB_BASE_URL": "https://wandb.example.org"})
    assert not logged_in({"HOME": str(tmp_path / "other")})
    assert logged_in({"HOME": "/", "NETRC": str(netrc), "WANDB_BASE_URL": "https://wandb.example.org"})
    netrc.write_text("machine api.wandb.ai nonsense\n")
    assert not logged_in(env)


def test_seeding_does_not_give_two_runs_one_id():
    ids = set()
    for _ in range(20):
        random.seed(0)
        ids.add(new_run_id())
    assert len(ids) == 20
    assert all(len(name) == 8 and name.isalnum() and name == name.lower() for name in ids)
