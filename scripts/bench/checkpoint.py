"""What a checkpoint costs: how long training stands still for it, how long it takes to write, verify and load.

    python scripts/bench/checkpoint.py                       # 50 million parameters on the CPU
    python scripts/bench/checkpoint.py --millions 1500       # on a GPU, if there is one

A plain engine on one rank trains a stack of square matrices with AdamW: 12 bytes of state per parameter. Each way of
saving is tried `--repeats` times, in turn; medians count. While a save is written in the background, training steps
are taken and timed, next to those without one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from encoders import circumstances
from torch import nn

from eagle_train.train.checkpoint import CheckpointDir
from eagle_train.train.engine import PlainEngine
from eagle_train.train.retention import Retention
from eagle_train.train.saving import Saver
from eagle_train.train.schedule import Stage

WIDTH = 1024


def make_engine(millions: int) -> PlainEngine:
    """Returns an engine of so many million parameters, after one step."""
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, millions * 1_000_000 // WIDTH**2))]
    rates = {str(place): 1e-3 for place in range(len(layers))}
    stage = Stage(recipe="none", learning_rates=rates, max_length=64, rows_per_step=1, num_steps=1)
    engine = PlainEngine(nn.Sequential(*layers), stage, 1, bf16=False)
    step_seconds(engine)
    return engine


def step_seconds(engine: PlainEngine) -> float:
    """Takes a training step; returns its time."""
    started = time.perf_counter()
    loss = engine.model(torch.ones(64, WIDTH, device=engine.device)).square().mean()
    engine.backward(loss, last=True)
    engine.step(1.0)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def save(saver: Saver, engine: PlainEngine, step: int, found: dict[str, list[float]]) -> None:
    """Saves once, taking steps until it is published."""
    kind = "background" if saver.background else "waiting"
    report = saver.save(engine, step, {}, wait=False)
    found[f"{kind} stall"].append(report.stall_seconds)
    during = []
    while not report.published:
        during.append(step_seconds(engine))
        saver.poll()
    found[f"{kind} write"].append(report.write_seconds)
    found["step meanwhile"] += during


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=50, help="of parameters")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    engine = make_engine(options.millions)
    names = ("waiting stall", "waiting write", "background stall", "background write", "step", "step meanwhile")
    found: dict[str, list[float]] = {name: [] for name in names} | {"verify": [], "load": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoints = CheckpointDir(Path(folder), Retention(last=1))
        savers = [Saver(checkpoints, background=background) for background in (False, True)]
        for repeat in range(options.repeats):
            for place, saver in enumerate(savers):
                save(saver, engine, 2 * repeat + place, found)
            found["step"] += [step_seconds(engine) for _ in range(5)]
            started = time.perf_counter()
            newest = checkpoints.latest()
            found["verify"].append(time.perf_counter() - started)
            started = time.perf_counter()
            engine.load(newest)
            found["load"].append(time.perf_counter() - started)
        size = savers[1].last.size / 2**30
    medians = {name: statistics.median(values) for name, values in found.items() if values}
    about = circumstances(str(engine.device))
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(f"state: {size:.2f} GiB\n\n| what | seconds (median) |\n|---|---|")
    print("\n".join(f"| {name} | {seconds:.3f} |" for name, seconds in medians.items()))
    print(json.dumps(about | {"gib": size} | medians))


if __name__ == "__main__":
    main()
