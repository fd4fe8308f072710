"""A real SLURM cluster on one machine, of two nodes that are two `slurmd`, to try batch scripts and to test with.

    python slurm/local_cluster.py                       a shell in which sbatch, srun and squeue work
    python slurm/local_cluster.py sinfo                 one command in it

Needs the programs of SLURM and munge (Debian, Ubuntu: `apt-get install --no-install-recommends slurmctld slurmd
slurm-client munge`), but no service of theirs: everything lives in a folder under /tmp and ends with the command. Run
by root or by one user, whose jobs it then runs.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo", "squeue", "scancel")
NODES = ("n1", "n2")
GPUS = [Path(f"/dev/tty{number}") for number in range(8)]
"""What the nodes pass for GPUs: SLURM wants device files, and opens none of them."""
START_SECONDS = 20.0
COMMAND_SECONDS = 30.0

CONFIG = """
ClusterName=eagle
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=10
JobRequeue=1
GresTypes=gpu
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=16 RealMemory=4000 {gres}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoCluster(RuntimeError):
    """There can be no cluster on this machine; the message says why."""


class LocalCluster:
    """Starts with `with`, stops after it.

    Raises:
        NoCluster: if a program is missing, or something does not start.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self.daemons: dict[str, subprocess.Popen] = {}
        self._stack = ExitStack()
        self.has_gpus = all(path.exists() for path in GPUS)

    def __enter__(self) -> LocalCluster:
        if missing := [name for name in PROGRAMS if find(name) is None]:
            raise NoCluster(f"no {', '.join(missing)} on this machine; see slurm/local_cluster.py for how to install")
        with ExitStack() as stack:  # what was begun is undone if the rest fails
            # A socket's path is limited to 108 characters: no folder of a test.
            self.folder = Path(tempfile.mkdtemp(prefix="eagle-slurm-")).resolve()
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            stack.callback(self.stop)
            self.write_config()
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which SLURM's commands find this cluster; no job of another is inherited."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        path = os.pathsep.join([inherited.get("PATH", ""), "/usr/sbin", "/sbin"])
        return inherited | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def write_config(self) -> None:
        """Writes slurm.conf and what else the daemons read."""
        gres = f"Gres=gpu:{len(GPUS)}" if self.has_gpus else ""
        config = CONFIG.format(folder=self.folder, user=getpass.getuser(), ports=free_ports(), gres=gres)
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/tty[0-7]\n" if gres else "")
        # From 23 on, slurmd asks for a cgroup plugin although nothing here uses one; 22 does not know this one.
        newer = int(re.search(r"(\d+)\.", self.run("slurmctld", "-V"))[1]) >= 23
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n" if newer else "")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        self.folder.chmod(0o755)  # munge wants its socket to be reachable

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle.

        Raises:
            NoCluster: if they do not come up; with the last lines of their logs.
        """
        at = self.folder
        names = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{name}={at / file}" for name, file in (names | {"seed-file": "munge.seed"}).items()]
        self.daemon("munged", "munged", "--foreground", "--force", *options)
        self.until(lambda: (at / "munge.sock").exists(), "munged")
        self.daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.until(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES), "the nodes")

    def start_node(self, node: str) -> None:
        """Starts the `slurmd` of a node."""
        self.daemon(node, "slurmd", "-D", "-N", node)

    def daemon(self, name: str, program: str, *arguments: str) -> None:
        """Starts a daemon that ends with this process, however that ends."""
        tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [*tied, find(program), *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def until(self, ready, what: str) -> None:
        """Waits for something to be ready.

        Raises:
            NoCluster: if it is not in time, or a daemon has ended.
        """
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            ended = [name for name, process in self.daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = {path.name: path.read_text(errors="replace")[-600:] for path in self.folder.glob("*.out")}
                raise NoCluster(f"{what} did not come up; ended: {ended or 'none'}; {logs}")
            time.sleep(0.05)

    def run(self, *command: str, check: bool = False) -> str:
        """Returns what one of SLURM's commands prints.

        Raises:
            RuntimeError: with `check`, if it fails.
        """
        words = [find(command[0]), *command[1:]]
        seconds = COMMAND_SECONDS
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=seconds, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    def stop(self) -> None:
        """Cancels all jobs and ends the daemons."""
        if "slurmctld" in self.daemons:
            try:
                self.run("scancel", "--user", getpass.getuser())
                for _ in range(100):
                    if not self.run("squeue", "-h", "--states=RUNNING,COMPLETING").strip():
                        break
                    time.sleep(0.1)
            except subprocess.TimeoutExpired:
                print("slurmctld does not answer; ending it", file=sys.stderr)
        for process in reversed(self.daemons.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.daemons.values():
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def find(program: str) -> str | None:
    """Returns where a program is; daemons are often outside of a user's PATH."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def free_ports() -> tuple[int, int, int]:
    """Returns a free port, and two neighbours that are free."""
    while True:
        with ExitStack() as stack:
            one, two = (stack.enter_context(socket.create_server(("", 0))) for _ in range(2))
            first = two.getsockname()[1]
            try:
                stack.enter_context(socket.create_server(("", first + 1)))
            except OSError:
                continue
            return one.getsockname()[1], first, first + 1


def main(command: list[str]) -> int:
    """Runs a command in a cluster; returns its exit code."""
    try:
        with LocalCluster() as cluster:
            return subprocess.run(
                command or [os.environ.get("SHELL", "bash")], env=cluster.environment, check=False
            ).returncode
    except NoCluster as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
