"""The runs that `chaos.py` disturbs: started as forks, asked how they ended, and compared."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from eagle_train.__main__ import main as eagle_train
from eagle_train.track.jsonl import read_metrics
from tests.runs import accounts, losses, make_data, overrides, rows

TOLERANCE = 1e-5
"""Of a loss around 6: sums over other numbers of ranks are added in another order."""
PATIENCE = 120
"""Seconds that a run may take between two disturbances before it counts as stuck."""
ENGINES = ("plain", "zero2", "zero3")
DISK_BYTES = 200_000
"""Largest file of a run whose disk is full: books and metrics fit, checkpoints do not."""

Disturbance = Callable[["Chaos", int, str], str]
"""Disturbs a run started on so many ranks by an engine of this name; returns what became of it."""


@dataclass
class Chaos:
    """The runs and what is done to them.

    Args:
        folder: of the data and the runs.
        seed: of every choice.
        num_steps: of the second stage of a run.
        max_ranks: a start has 1 to so many.
    """

    folder: Path
    seed: int
    num_steps: int
    max_ranks: int
    run: Path = field(init=False)
    done: Counter[str] = field(default_factory=Counter)
    finished: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.data = make_data(self.folder / "data")
        self.calm = self.folder / "calm"
        codes = wait(self.start(1, "plain", self.calm), PATIENCE)
        assert codes == [0], f"the run that is left alone ended with {codes}; see {self.calm}.*.log"
        self.new_run()

    def new_run(self) -> None:
        """Begins another run."""
        self.run = self.folder / f"run-{self.finished}"

    def start(self, ranks: int, engine: str, run: Path, *more: str, file_bytes: int | None = None) -> list[BaseProcess]:
        """Starts or resumes a run; returns its ranks."""
        arguments = overrides(
            self.data,
            run,
            f"engine={engine}",
            f"schedule.sft.num_steps={self.num_steps}",
            "schedule.sft.rows_per_step=4",
            "save_every=3",
            "log_every=1",
            "data.max_bad_share=0",
            "async_save=true",
            *more,
        )
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = str(sock.getsockname()[1])
        place = {"WORLD_SIZE": str(ranks), "MASTER_PORT": port}
        context = multiprocessing.get_context("fork")
        processes = []
        for rank in range(ranks):
            env = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            log = run.with_name(f"{run.name}.{rank}.log")
            processes.append(context.Process(target=run_rank, args=(arguments, env, log, file_bytes)))
            processes[-1].start()
        return processes

    def disturb(self, act: Disturbance) -> str:
        """Disturbs the run once; returns what became of it. A run that is complete is compared."""
        ranks, engine = self.random.randint(1, self.max_ranks), self.random.choice(ENGINES)
        what = act(self, ranks, engine)
        self.done[act.__name__] += 1
        return f"{act.__name__:<16} {engine:<5} x{ranks}: {what}"

    def settle(self) -> None:
        """Lets the run come to its end, and compares it."""
        ranks, engine = self.random.randint(1, self.max_ranks), self.random.choice(ENGINES)
        codes = wait(self.start(ranks, engine, self.run), PATIENCE)
        assert codes == [0] * ranks, f"{self.run} ended with {codes}; see {self.run}.*.log"
        self.compare()

    def compare(self) -> None:
        """Asserts that a complete run is what the undisturbed one is, and goes on to the next."""
        calm, mine = losses(self.calm), losses(self.run)
        assert len(mine) == len(calm), f"{len(mine)} steps instead of {len(calm)}"
        worst = max(abs(a - b) for a, b in zip(calm, mine, strict=True))
        assert worst <= TOLERANCE, f"losses of {self.run} differ by {worst}"
        assert rows(self.run) == rows(self.calm), f"rows of {self.run} differ"
        for sources in accounts(self.run).values():
            for source, entry in sources.items():
                assert entry["read"] == entry["used"] + sum(entry["dropped"].values()), (source, entry)
        assert accounts(self.run) == accounts(self.calm)
        self.finished += 1
        self.new_run()

    def moment(self, processes: list[BaseProcess]) -> bool:
        """Waits for a random moment of a run, in its start or one of its next steps; False if it ended before."""
        if self.random.random() < 0.2:
            return not ended_within(processes, self.random.uniform(0.1, 1.5))
        steps = self.steps_logged()
        for wanted in range(steps + 1, steps + 1 + self.random.randint(1, 6)):
            deadline = time.monotonic() + PATIENCE
            while self.steps_logged() < wanted:
                if ended_within(processes, 0.01):
                    return False
                assert time.monotonic() < deadline, f"{self.run} made no step in {PATIENCE} s"
        return not ended_within(processes, self.random.uniform(0, 0.1))

    def steps_logged(self) -> int:
        """Returns the number of steps in the metrics of the run."""
        path = self.run / "metrics.jsonl"
        return sum("train/loss" in record for record in read_metrics(path)) if path.exists() else 0

    def checkpoints(self) -> list[Path]:
        """Returns the published checkpoints, oldest first."""
        return sorted(path for path in (self.run / "checkpoints").glob("step-*") if path.suffix == "")

    def ended(self, processes: list[BaseProcess], codes: tuple[int, ...]) -> str:
        """Returns how a run ended, which must be in one of these ways; a complete one is compared."""
        found = wait(processes, PATIENCE)
        if all(code == 0 for code in found):
            self.compare()
            return "complete and the same"
        assert set(found) <= {0, *codes}, f"{self.run} ended with {found} instead of {codes}; see its logs"
        return f"ended with {found} after step {self.steps_logged()}"


KILLED = (-signal.SIGKILL, -signal.SIGABRT, 1)
"""How ranks end that are killed, or whose neighbour was."""
PREEMPTED = 75
"""The exit code of a run that saved its state because it was asked to stop."""


def run_rank(arguments: list[str], env: dict[str, str], log: Path, file_bytes: int | None) -> None:
    """One rank of a run, in a process of its own; what it says goes to `log`."""
    os.environ |= env
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    torch.set_num_threads(1)
    code = 1
    try:
        code = eagle_train(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code:
            traceback.print_exc()
        os._exit(code)


def ended_within(processes: list[BaseProcess], seconds: float) -> bool:
    """Waits so long; returns whether a process has ended by then."""
    return bool(multiprocessing.connection.wait([process.sentinel for process in processes], seconds))


def kill(processes: list[BaseProcess]) -> None:
    """SIGKILL to all."""
    for process in processes:
        process.kill()


def wait(processes: list[BaseProcess], seconds: float) -> list[int]:
    """Returns the exit codes; once a rank failed, the others get five seconds to follow, as launchers do."""
    deadline = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + 5)
        ended_within([process for process in processes if process.is_alive()], 0.1)
    kill(processes)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
