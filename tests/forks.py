"""Processes that are forks of one that has imported everything: a start takes a moment instead of ten seconds.

That one is `multiprocessing`'s fork server, beside pytest and doing nothing else, so that no thread and no open file of
a test is copied. What is about the interpreter itself starts one: `tests.runs.start`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.fork_imports"])


class Fork:
    """`python -m module ...` or `python script.py ...` in a session of its own, with some of what `Popen` offers.

    Args:
        program: the module, or the path of a script.
        arguments: of the command line.
        environment: all variables.
    """

    def __init__(self, program: str, arguments: list[str], environment: dict[str, str]) -> None:
        self._said = [NamedTemporaryFile(prefix="fork-") for _ in range(2)]  # noqa: SIM115 (closed when it was read)
        files = [file.name for file in self._said]
        self._process = SERVER.Process(target=run, args=(program, arguments, environment, files))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Returns the exit code, see `returncode`."""
        return self.returncode

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.terminate()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; returns what was written to stdout and to stderr.

        Raises:
            subprocess.TimeoutExpired: with what was written so far; the process is killed.
        """
        self._process.join(timeout)
        late = self.returncode is None
        if late:
            self._process.kill()
            self._process.join()
        out, error = (Path(file.name).read_text() for file in self._said)
        for file in self._said:
            file.close()
        if late:
            raise subprocess.TimeoutExpired(self._process.name, timeout, out, error)
        return out, error


def run(program: str, arguments: list[str], environment: dict[str, str], files: list[str]) -> None:
    """Is what a fork does."""
    os.setsid()
    for descriptor, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    # The server's own may be what pytest captures, of which only the descriptors are replaced above.
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ |= environment
    torch.set_num_threads(1)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
