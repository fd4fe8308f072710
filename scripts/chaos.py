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
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from chaos_runs import DISK_BYTES, KILLED, PATIENCE, PREEMPTED, TOLERANCE, Chaos, Disturbance, ended_within, kill, wait

from eagle_train.train.zero.join import import_deepspeed


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


DISTURBANCES: dict[str, Disturbance] = {
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
        text = chaos.disturb(DISTURBANCES[order[place]])
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
