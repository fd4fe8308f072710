"""SLURM's home: the variables of a step's tasks, and the few things asked of the scheduler."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger(__name__)

COMMAND_SECONDS = 20.0
"""A scheduler that does not answer in this time is taken for one that is not there."""
FIRST_PORT, NUM_PORTS = 20000, 12000
"""Ports below 32768, where Linux begins to give ports to outgoing connections, so that none of those is in the way."""


def in_step(env: Mapping[str, str]) -> bool:
    """Returns whether this process is a task of a step, started by `srun`.

    The variables of a batch script alone (`SLURM_NTASKS`) do not count: they would make a single process wait for
    others that were never started.
    """
    return "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env


def rank(env: Mapping[str, str]) -> int:
    """Returns this task's number in its step."""
    return int(env["SLURM_PROCID"])


def local_rank(env: Mapping[str, str]) -> int:
    """Returns this task's number on its node."""
    return int(env["SLURM_LOCALID"])


def world_size(env: Mapping[str, str]) -> int:
    """Returns the number of tasks of the step."""
    return int(env["SLURM_STEP_NUM_TASKS"])


def step_token(env: Mapping[str, str]) -> str:
    """Returns what tells one start of a step from all others of the cluster, the same for all its tasks."""
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return ".".join(env.get(name, "0") for name in names)


def ports(env: Mapping[str, str], count: int) -> list[int]:
    """Returns ports at which the tasks of a step may meet, the same for all of them, in the order to try.

    Jobs that share a node have neighbouring ids: their first ports differ, and so do those of a job's steps.
    """
    step = env.get("SLURM_STEP_ID", "0")
    first = int(env.get("SLURM_JOB_ID", "0")) * 7 + (int(step) if step.isdigit() else 0)
    return [FIRST_PORT + (first + number * 997) % NUM_PORTS for number in range(count)]


def master_address(
    env: Mapping[str, str],
    resolves: Callable[[str], bool] | None = None,
    ask: Callable[[str], str | None] | None = None,
) -> str:
    """Returns an address of rank 0's node, which is the first of the step.

    Where `srun` was launched from a login node, the launch node is not one of the step's: its address is the last
    resort, for clusters whose node names do not resolve and whose tasks have no `scontrol` (inside containers).

    Args:
        resolves: whether a host name has an address.
        ask: a node's address as the scheduler knows it, if it tells.
    """
    hosts = expand_hosts(env.get("SLURM_STEP_NODELIST", ""))
    if len(hosts) == 1 or not hosts:
        return "127.0.0.1" if hosts else env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    first = hosts[0]
    if address := aliases(env.get("SLURM_NODE_ALIASES", "")).get(first):
        return address
    if (resolves or host_resolves)(first):
        return first
    return (ask or node_address)(first) or env.get("SLURM_LAUNCH_NODE_IPADDR", first)


def expand_hosts(nodes: str) -> list[str]:
    """Returns the hosts of a node list, in order: `n[1-2,07],login` -> n1, n2, n07, login.

    Source: "hostlist expressions" of the SLURM manual; several brackets in one name vary from the last on.
    """
    hosts = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        names = [""]
        for text, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            parts = [text] if text else [number for part in ranges.split(",") for number in numbers(part)]
            names = [name + part for name in names for part in parts]
        hosts += names
    return hosts


def numbers(part: str) -> list[str]:
    """Returns the numbers of one part of a bracket, zeros in front kept: `08-10` -> 08, 09, 10."""
    first, _, last = part.partition("-")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]


def aliases(text: str) -> dict[str, str]:
    """Returns name -> address of SLURM_NODE_ALIASES: `name:address:host` with commas between, IPv6 in brackets."""
    found = re.findall(r"([^:,]+):(?:\[([^\]]+)\]|([^:,\[]+)):[^,]*", text)
    return {name: v6 or v4 for name, v6, v4 in found}


def node_name() -> str:
    """Returns SLURM's name of this node; empty outside of a job."""
    return os.environ.get("SLURMD_NODENAME", "")


def host_resolves(host: str) -> bool:
    """Returns whether a host name has an address here."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def node_address(node: str) -> str | None:
    """Returns the address by which the scheduler reaches a node; None if there is no scheduler to ask."""
    address = fields(command(["scontrol", "show", "node", "--oneliner", node]) or "").get("NodeAddr")
    return address if address and host_resolves(address) else None


def end_time() -> float | None:
    """Returns when the job reaches its wall time, seconds since the epoch; None: no job, no limit, or not told.

    The scheduler is asked first, since limits get extended; `SLURM_JOB_END_TIME`, which `slurm/train.sbatch` sets,
    is for containers without its commands.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    text = show_job(job).get("EndTime") or os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def requeue(*, hold: bool = False) -> bool:
    """Asks for this job to be run again; returns whether it will. Its processes then get SIGTERM and soon SIGKILL.

    A job that was cancelled is no longer running and stays so, although SLURM would revive it. Interactive jobs and
    those submitted with `--no-requeue` are refused by SLURM.

    Args:
        hold: not before its user says so, with `scontrol release`.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    told = show_job(job)
    state = told.get("JobState", "unknown")
    if state != "RUNNING":
        log.warning("job %s is %s: not requeued", job, state)
        return False
    if "ArrayTaskId" in told:  # by the number alone, one of the tasks would stand for the whole array
        job = f"{told['ArrayJobId']}_{told['ArrayTaskId']}"
    done = command(["scontrol", "requeuehold" if hold else "requeue", job]) is not None
    held = f", held until `scontrol release {job}`" if hold else ""
    log.warning("job %s %s", job, f"is requeued{held}" if done else "is not requeued; submit it again to go on")
    return done


def show_job(job: str) -> dict[str, str]:
    """Returns what the scheduler tells about a job, times in seconds since the epoch; empty if it tells nothing.

    A job array is told task by task under the number of one of them, a heterogeneous job part by part.
    """
    told = [fields(line) for line in (command(["scontrol", "show", "job", "--oneliner", job]) or "").splitlines()]
    return next((one for one in told if one.get("JobId") == job), {})


def fields(line: str) -> dict[str, str]:
    """Returns the fields of a line of `scontrol`: `A=1 B=x=y` -> A: 1, B: x=y."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def command(words: Sequence[str]) -> str | None:
    """Returns what a command of SLURM prints, or None if there is none, it fails or it does not answer."""
    if shutil.which(words[0]) is None:
        return None
    env = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    try:
        # A job's name may be in any encoding.
        done = subprocess.run(
            words, env=env, capture_output=True, errors="replace", timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("%s: %s", " ".join(words), error)
        return None
    if done.returncode:
        log.warning("%s: %s", " ".join(words), (done.stderr or done.stdout).strip())
        return None
    return done.stdout
