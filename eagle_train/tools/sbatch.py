"""The batch script of an experiment: `slurm/train.sbatch` with its directives and its command filled in."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from eagle_train.resources import resource_dir

CHECK_SECONDS = 30
CPUS_BESIDE_WORKERS = 2
"""Of each rank: its main thread, and what plans rows, tracks and watches."""
SETTINGS = {"venv": "VENV", "container": "CONTAINER", "apptainer": "APPTAINER", "mounts": "MOUNTS", "logs": "LOGS"}
"""Option -> variable of the script."""
SCRIPT_OPTIONS = (
    *("nodes", "gpus_per_node", "time", "signal_seconds", "job_name", "partition", "account", "qos"),
    *SETTINGS,
)
"""Options that change the script alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--sbatch` and what belongs to it."""
    group = parser.add_argument_group("batch script")
    group.add_argument("--sbatch", action="store_true", help="print the SLURM script of the experiment instead")
    group.add_argument("--nodes", type=int, default=1)
    group.add_argument("--gpus-per-node", type=int, default=8, help="also the ranks per node; 0: no GPUs, one rank")
    group.add_argument("--time", default="24:00:00", help="wall time; the run saves before it and is requeued")
    group.add_argument("--signal-seconds", type=int, default=600, help="USR1 comes so long before the end")
    group.add_argument("--job-name", help="default: the experiment's name")
    group.add_argument("--partition")
    group.add_argument("--account")
    group.add_argument("--qos")
    group.add_argument("--venv", help="folder of the virtual environment")
    group.add_argument("--container", help="image for pyxis")
    group.add_argument("--apptainer", help="image for apptainer")
    group.add_argument("--mounts", help="of the container, A:B,C:D")
    group.add_argument("--logs", help="folder of the ranks' outputs; default: logs")


def print_script(options: argparse.Namespace, config: Mapping[str, Any]) -> int:
    """Prints the script, checked by the scheduler where there is one; returns the exit code."""
    script = render(options, config)
    said, good = check(script)
    print(script, end="")
    print(said, file=sys.stderr)
    return 0 if good else 1


def render(options: argparse.Namespace, config: Mapping[str, Any]) -> str:
    """Returns the batch script of a config.

    Raises:
        ValueError: if the options contradict each other.
    """
    if sum(value is not None for value in (options.venv, options.container, options.apptainer)) > 1:
        raise ValueError("--venv, --container and --apptainer are three places of Python; give one of them")
    if options.nodes < 1 or options.gpus_per_node < 0:
        raise ValueError(f"{options.nodes} nodes with {options.gpus_per_node} GPUs make no job")
    script = (resource_dir("slurm") / "train.sbatch").read_text()
    for name, value in directives(options, config).items():
        script = with_directive(script, name, value)
    arguments = shlex.join(options.overrides)
    script = script.replace('arguments=("$@")', f'arguments=({arguments} "$@")')
    for option, variable in SETTINGS.items():
        if (value := getattr(options, option)) is not None:
            line = f"{variable}={shlex.quote(value)}"
            script = re.sub(rf"^{variable}=.*$", lambda _, line=line: line, script, flags=re.MULTILINE)
    return script


def directives(options: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Returns the `#SBATCH` options of a config; None: not given, the empty text: given without a value."""
    gpus = options.gpus_per_node
    return {
        "job-name": options.job_name or re.sub(r"[^\w.-]", "-", config["name"]),
        "nodes": str(options.nodes),
        "ntasks-per-node": str(gpus or 1),
        "gpus-per-node": str(gpus) if gpus else None,
        "cpus-per-task": str(config["data"]["num_workers"] + CPUS_BESIDE_WORKERS),
        "time": options.time,
        "signal": f"USR1@{options.signal_seconds}",
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "mem": "0" if gpus else None,
        "exclusive": "" if gpus else None,
    }


def with_directive(script: str, name: str, value: str | None) -> str:
    """Returns the script with one `#SBATCH` option set, added after the others, or left out."""
    # sbatch knows quotes, and takes what follows a space or `#` without them for something else.
    line = None if value is None else f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"
    lines = script.splitlines()
    places = [i for i, text in enumerate(lines) if re.match(rf"#SBATCH --{name}(=|$)", text)]
    others = [i for i, text in enumerate(lines) if text.startswith("#SBATCH")]
    if places:
        lines[places[0] : places[0] + 1] = [line] if line else []
    elif line:
        lines.insert(others[-1] + 1, line)
    return "\n".join(lines) + "\n"


def check(script: str, command: Sequence[str] = ("sbatch", "--test-only")) -> tuple[str, bool]:
    """Returns what the scheduler says to a script, and whether it takes it; a machine without one takes all."""
    if shutil.which(command[0]) is None:
        return f"not checked: there is no `{command[0]}` on this machine", True
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not checked: `{shlex.join(command)}` does not answer", True
    return (done.stderr or done.stdout).strip(), done.returncode == 0
