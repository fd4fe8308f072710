"""Runs on a real SLURM cluster of two nodes on this machine; skipped, with the reason, where there can be none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eagle_train.tools import plan
from eagle_train.track.jsonl import read_metrics
from eagle_train.train.run_folder import read_attempts
from slurm.local_cluster import LocalCluster, NoCluster
from tests.runs import losses, overrides, rows
from tests.track.test_wandb_tracker import history

pytestmark = [pytest.mark.slow, pytest.mark.long]
ROOT = Path(__file__).parents[1]
NUM_STEPS = 40
SECONDS = 600
"""For anything to happen that is waited for; with two cores, and other tests on them."""
MARGIN = 300
"""Seconds of wall time to be left when a run saves."""


@pytest.fixture(scope="module")
def cluster():
    try:
        with LocalCluster() as running:
            yield running
    except NoCluster as error:
        pytest.skip(f"no SLURM cluster: {error}")


@pytest.fixture
def patient(request, cluster):
    """Returns a function that waits for something, and fails with what the cluster and the ranks say."""

    def wait(what, condition, run):
        deadline = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > deadline:
                logs = [path.read_text()[-1500:] for path in sorted(run.parent.rglob("*.log"))[-2:]]
                jobs = cluster.run("scontrol", "show", "job", "--oneliner")
                pytest.fail("\n".join([f"waited {SECONDS} s for {what}", jobs, *logs]))
            time.sleep(0.2)  # each look is a process or two

    return wait


def command(data, run):
    """Returns the overrides of a run with ZeRO-3 and W&B."""
    asked = overrides(data, run, "engine=zero3", f"schedule.sft.num_steps={NUM_STEPS - 3}", "save_every=10")
    asked = [text for text in asked if text not in ("tracker.wandb=null", "save_every=2")]
    return [*asked, f"preemption.margin_seconds={MARGIN}", "preemption.save_seconds=1"]


def environment(cluster):
    """Returns what commands and ranks get; without Dynamo, which nothing here uses and which takes long to import."""
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "TORCHDYNAMO_DISABLE": "1"}
    return cluster.environment | here


@pytest.fixture(scope="module")
def undisturbed(data, cluster, tmp_path_factory):
    """A run by `srun` alone, as from a login node; what the others are compared with."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    words = ["srun", "-N2", "--ntasks-per-node=1", sys.executable, "-m", "eagle_train", *command(data, run)]
    done = subprocess.run(words, env=environment(cluster), capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return run


class Job:
    """A batch job and the run it is about."""

    def __init__(self, cluster, script, run):
        self.cluster, self.run = cluster, run
        self.path = run.parent / "job.sbatch"
        self.path.write_text(script)
        self.submit()

    def submit(self):
        words = ["sbatch", "--parsable", f"--chdir={self.run.parent}", str(self.path)]
        env = environment(self.cluster)
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=30, check=True)
        self.id = done.stdout.strip()

    def field(self, name):
        words = self.cluster.run("scontrol", "show", "job", "--oneliner", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word).get(name, "")

    def update(self, **fields):
        words = [f"{name}={value}" for name, value in fields.items()]
        self.cluster.run("scontrol", "update", f"JobId={self.id}", *words, check=True)

    def hurry(self):
        """Whether it runs; if not, it need not wait for its turn."""
        state = self.field("JobState")
        if state == "PENDING" and self.field("Reason") == "BeginTime":
            self.update(StartTime="now")
        return state == "RUNNING"

    def has_trained(self, start, steps=2):
        """Whether the start of this number, from 0, has logged so many steps."""
        starts, metrics = read_attempts(self.run), self.run / "metrics.jsonl"
        if len(starts) <= start or not metrics.exists():
            return False
        records = read_metrics(metrics)
        return sum(record["time"] > starts[start]["time"] for record in records) >= steps

    def pid(self, rank):
        """Returns the process of a rank."""
        wanted = {f"SLURM_JOB_ID={self.id}".encode(), f"SLURM_PROCID={rank}".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if words[1:3] == [b"-m", b"eagle_train"] and wanted <= set(
                    (folder / "environ").read_bytes().split(b"\0")
                ):
                    return int(folder.name)
            except OSError:
                continue
        raise AssertionError(f"no process of rank {rank}")

    def has_rank(self, rank):
        """Whether a process of a rank is alive."""
        try:
            return self.pid(rank) > 0
        except AssertionError:
            return False


def is_up(cluster):
    """Whether n2 is used again: it is idle, or planned for a job that waits."""
    state = cluster.run("sinfo", "-hn", "n2", "-o", "%T").strip()
    return state.rstrip("*") in ("idle", "planned", "allocated", "mixed")


def resume(cluster):
    """Asks for n2 to be used again; refused while the job on it is being ended."""
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")


def test_a_run_disturbed_in_every_way_ends_like_one_that_was_not(data, cluster, undisturbed, tmp_path, patient, capsys):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, cluster.environment[name])
        size = ["--nodes=2", "--gpus-per-node=0", "--time=30", "--signal-seconds=1", f"--venv={sys.prefix}"]
        assert plan.main([*command(data, run), "--sbatch", *size]) == 0
    printed = capsys.readouterr()
    assert "to start at" in printed.err, "sbatch --test-only was asked"
    job = Job(cluster, printed.out, run)

    def again(restarts, **changes):
        """Waits until the job is requeued, and lets it start at once, where SLURM waits for two minutes."""
        patient(f"restart {restarts}", lambda: job.field("Restarts") == str(restarts), run)
        patient("PENDING", lambda: job.field("JobState") == "PENDING", run)
        patient("the end of its ranks", lambda: not job.has_rank(1), run)  # a node that was down ends what it had late
        time.sleep(2)  # a node refuses a job that it was told to kill in the same second
        if changes:
            job.update(**changes)
        patient(f"start {restarts}", job.hurry, run)

    patient("steps of the first start", lambda: job.has_trained(0), run)
    os.kill(job.pid(1), signal.SIGUSR1)  # the signal reaches one rank only
    again(1)
    patient("steps after USR1", lambda: job.has_trained(1), run)
    os.kill(job.pid(1), signal.SIGKILL)
    again(2)
    patient("steps after SIGKILL", lambda: job.has_trained(2), run)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test", check=True)
    patient("requeue from a dead node", lambda: job.field("JobState") == "PENDING", run)
    patient("the node", lambda: is_up(cluster) or resume(cluster), run)
    again(3, TimeLimit=MARGIN // 60 - 1)  # minutes: there is time for one step
    again(4, TimeLimit=30)
    patient("steps after the wall time", lambda: job.has_trained(4), run)
    cluster.run("scancel", job.id, check=True)
    patient("the end of the cancelled", lambda: job.field("JobState") == "CANCELLED", run)
    job.submit()
    patient("the end", lambda: job.field("JobState") in ("COMPLETED", "FAILED"), run)

    said = "".join(path.read_text() for path in (tmp_path / "logs").rglob("*.log"))
    assert job.field("JobState") == "COMPLETED", said[-4000:]
    assert len(losses(run)) == NUM_STEPS
    assert losses(run) == losses(undisturbed)
    assert rows(run) == rows(undisturbed)
    check_starts(run, said)


def check_starts(run, said):
    """Checks where each start went on from, that every one was of the same W&B run, and what was said."""
    starts = read_attempts(run)
    steps = [int((start["resumed_from"] or "step-0").removeprefix("step-")) for start in starts]
    # kill and node failure may go on from the same checkpoint; where the run could save, it goes on from there
    assert steps == sorted(steps) and steps[0] == 0 and len(starts) == 6, steps
    assert steps[1] % 10 and steps[4] == steps[3] + 1 and steps[5] > steps[4], steps
    assert "wall time ends in" in said and "is requeued" in said and "is COMPLETING: not requeued" in said
    assert {start["run_id"] for start in starts} == {starts[0]["run_id"]}
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert [path.name.rpartition("-")[2] for path in folders] == [starts[0]["run_id"]] * len(starts)
    # What a start logged last is sent again by the next: the last folder alone has the whole of this short run.
    points = {point["global_step"]: point for point in history(folders[-1]) if "train/loss" in point}
    assert [points[step]["train/loss"] for step in sorted(points)] == losses(run)
