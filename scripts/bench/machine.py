"""Where a benchmark ran, and how much memory its process holds."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np


def circumstances() -> dict[str, str]:
    """Returns hardware, command and commit."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = partial(subprocess.run, capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--", "../../eagle_train", "."]).stdout.strip()
    return {
        "hardware": f"{names[0] if names else platform.machine()}, one of {os.cpu_count()} CPUs",
        "command": "python " + " ".join(sys.argv),
        "commit": commit + (" with changes" if changed else ""),
        "versions": f"Python {platform.python_version()}, numpy {np.__version__}",
    }


def memory_mib(field: str) -> float:
    """Returns a field of Linux's `/proc/self/status` in MiB: `VmRSS`, `VmHWM` (the peak), `RssAnon`, `RssFile`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Gives freed memory back to the system and lets the peak restart from what is held now; with glibc only."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
