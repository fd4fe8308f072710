"""Disturbs toy runs at random and proves that nothing was lost: same losses, same rows, balanced books.

    python scripts/chaos.py                          # 200 disturbances
    python scripts/chaos.py --disturbances 10 --seed 3
    python scripts/chaos.py --kinds kill_rank torn_checkpoint --keep /tmp/chaos

One run is left alone. Others, of the same config, are killed (one rank or all, in the middle of a step or of a save),
asked to stop, stopped for a while, given a disk that fills up, a shard with damaged bytes or a row whose loss is NaN,
and find the newest checkpoint truncated, changed or incomplete; after each disturbance they are started again by the
same command, on another number of ranks and by another engine. When a run is complete, every step must be there
once, with the loss and the rows of the run that was left alone, and every sample read must be accounted for.

The processes are forked from this one, which has imported everything, so a start takes a second instead of ten. Prints
a line per disturbance; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
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
from eagle_train.train.zero.join import import_deepspeed
from tests.runs import accounts, losses, make_data, overrides, rows

TOLERANCE = 1e-5
"""Of a loss around 6: sums over other numbers of ranks are added in another order."""
PATIENCE = 120
"""Seconds that a run may take between two disturbances before it counts as stuck."""
ENGINES = ("plain", "zero2", "zero3")
DISK_BYTES = 200_000
"""Largest file of a run whose disk is full: books and metrics fit, checkpoints do not."""


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

    def disturb(self, kind: str) -> str:
        """Disturbs the run once; returns what became of it. A run that is complete is compared."""
        ranks, engine = self.random.randint(1, self.max_ranks), self.random.choice(ENGINES)
        what = DISTURBANCES[kind](self, ranks, engine)
        self.done[kind] += 1
        return f"{kind:<16} {engine:<5} x{ranks}: {what}"

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
        steps = self.steps_logged() + self.random.randint(1, 6)
        deadline = time.monotonic() + PATIENCE
        while self.steps_logged() < steps:
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


def kill_rank(chaos: Chaos, ranks: int, engine: str) -> str:
    """SIGKILL to one rank; the others, which cannot go on, are ended as srun or torchrun do."""
    processes = chaos.start(ranks, engine, chaos.run)
    if chaos.moment(processes):
        chaos.random.choice(processes).kill()
        ended_within(processes, chaos.random.uniform(0, 0.5))
        kill(processes)
    return chaos.ended(processes, KILLED)


def kill_all(chaos: Chaos, ranks: int, engine: str) -> str:
    """SIGKILL to all ranks at once."""
    processes = chaos.start(ranks, engine, chaos.run)
    if chaos.moment(processes):
        kill(processes)
    return chaos.ended(processes, KILLED)


def ask_one(chaos: Chaos, ranks: int, engine: str) -> str:
    """SIGTERM to one rank only: all save together and end."""
    processes = chaos.start(ranks, engine, chaos.run)
    if chaos.moment(processes):
        chaos.random.choice(processes).terminate()
    return chaos.ended(processes, (*KILLED, -signal.SIGTERM, PREEMPTED))


def stop_awhile(chaos: Chaos, ranks: int, engine: str) -> str:
    """A rank that stands still for a second, as one whose storage does, holds the others up and changes nothing."""
    processes = chaos.start(ranks, engine, chaos.run)
    if chaos.moment(processes):
        still = chaos.random.choice(processes)
        os.kill(still.pid, signal.SIGSTOP)
        time.sleep(chaos.random.uniform(0.2, 1.0))
        os.kill(still.pid, signal.SIGCONT)
        if chaos.moment(processes):
            kill(processes)
    return chaos.ended(processes, KILLED)


def torn_checkpoint(chaos: Chaos, ranks: int, engine: str) -> str:
    """The newest of at least two checkpoints is damaged while the run is down; it goes on from the one before."""
    processes = chaos.start(ranks, engine, chaos.run)
    if chaos.moment(processes):
        kill(processes)
    what = chaos.ended(processes, KILLED)
    if len(found := chaos.checkpoints()) < 2:
        return what + ", too early to damage a checkpoint"
    damaged = chaos.random.choice([path for path in found[-1].rglob("*") if path.is_file() and path.stat().st_size])
    how = chaos.random.choice(["cut", "gone", "flipped"])
    if how == "gone":
        damaged.unlink()
    else:
        data = bytearray(damaged.read_bytes())
        if how == "cut":
            del data[chaos.random.randrange(len(data)) :]
        else:
            data[chaos.random.randrange(len(data))] ^= 1 << chaos.random.randrange(8)
        damaged.write_bytes(data)
    return f"{what}; {damaged.relative_to(found[-1])} of {found[-1].name} is {how}"


def full_disk(chaos: Chaos, ranks: int, engine: str) -> str:
    """No room for a checkpoint: the last one stays; the run goes on or stops, and is killed in the end."""
    processes = chaos.start(ranks, engine, chaos.run, file_bytes=DISK_BYTES)
    if chaos.moment(processes):
        kill(processes)
    return chaos.ended(processes, (*KILLED, 1))


def damaged_shard(chaos: Chaos, ranks: int, engine: str) -> str:
    """A shard's bytes change while the run is down: it stops for the bad sample or refuses; then they are restored."""
    shard = chaos.random.choice(sorted(chaos.data.glob("small_shapes/*.tar")))
    whole, times = shard.read_bytes(), shard.stat()
    start = whole.index(b"IDAT", chaos.random.randrange(len(whole) // 2)) + 8
    shard.write_bytes(whole[:start] + bytes(64) + whole[start + 64 :])
    try:
        processes = chaos.start(ranks, engine, chaos.run)
        if chaos.moment(processes):
            kill(processes)
        found = wait(processes, PATIENCE)
        assert any(found), f"{chaos.run} came to its end with a damaged shard"
    finally:
        shard.write_bytes(whole)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        for rest in chaos.data.glob("small_shapes/*.tar.*"):  # indexes that were made of the damaged bytes
            rest.unlink()
    return f"ended with {found} after step {chaos.steps_logged()}"


def nan_row(chaos: Chaos, ranks: int, engine: str) -> str:
    """The loss of one row is NaN: the run stops with the state before that step."""
    step = chaos.steps_logged() + chaos.random.randint(0, 4)
    poison = f"+engine.row={4 * step}"
    processes = chaos.start(ranks, engine, chaos.run, poison, f"engine._target_=tests.poisoned.{engine}")
    return chaos.ended(processes, (*KILLED, 1))


DISTURBANCES: dict[str, Callable[[Chaos, int, str], str]] = {
    function.__name__: function
    for function in (
        kill_rank,
        kill_all,
        ask_one,
        stop_awhile,
        torn_checkpoint,
        full_disk,
        damaged_shard,
        nan_row,
    )
}
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


def parse() -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disturbances", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", choices=sorted(DISTURBANCES), default=list(DISTURBANCES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24, help="of the second stage of a run")
    parser.add_argument("--max-ranks", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder for data and runs, which stay; default: a temporary one")
    return parser.parse_args()


def main() -> None:
    """Disturbs runs, and says what became of them."""
    args = parse()
    import_deepspeed()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    chaos = Chaos(folder, args.seed, args.steps, args.max_ranks)
    for number in range(args.disturbances):
        # Each kind in turn, so that all occur, in an order of its own every time.
        turn, place = divmod(number, len(args.kinds))
        order = random.Random(f"{args.seed}-{turn}").sample(args.kinds, len(args.kinds))
        text = chaos.disturb(order[place])
        print(f"[{time.monotonic() - began:7.1f} s] {number + 1}/{args.disturbances} {text}", flush=True)
    if chaos.run.exists():
        chaos.settle()
    if not args.keep:
        shutil.rmtree(folder)
    seconds = round(time.monotonic() - began)
    print(
        f"{args.disturbances} disturbances of {chaos.finished} runs in {seconds} s: every step once, losses within "
        f"{TOLERANCE:g}, rows and books the same"
    )
    print(json.dumps({"disturbances": dict(chaos.done), "runs": chaos.finished, "seed": args.seed, "seconds": seconds}))


if __name__ == "__main__":
    main()
