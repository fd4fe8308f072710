"""`python -m tests.checkpoint_ranks OUT save:ENGINES load:ROADS fail:ENGINE ...` on any number of ranks.

`save` trains with every engine, saves in the middle and goes on; `load` goes on from those checkpoints, on these ranks,
with other engines. Rank 0 leaves the losses and final weights of each; `tests/train/test_checkpoint_ranks.py` compares.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from torch import nn

from eagle_train import dist
from eagle_train.train.checkpoint import CheckpointDir
from eagle_train.train.engine import Engine, PlainEngine
from eagle_train.train.optim import freeze
from eagle_train.train.saving import Saver
from eagle_train.train.schedule import Stage
from eagle_train.train.zero.engine import ZeroEngine
from tests.toys import tiny_model, tiny_row, tiny_sample

SHARDED = {"persistence_threshold": 100, "prefetch_bucket_size": 1000}  # some weights stay whole, most do not
ENGINES = {
    "plain": (PlainEngine, {}),
    "zero2": (ZeroEngine, {"zero_stage": 2}),
    "zero3": (ZeroEngine, {"zero_stage": 3, **SHARDED}),
    "zero1-bf16": (ZeroEngine, {"zero_stage": 1, "bf16": True}),
    "zero3-bf16": (ZeroEngine, {"zero_stage": 3, "bf16": True, **SHARDED}),
}
ROWS = 2
SAVED, STEPS = 3, 6


def make() -> tuple[nn.Module, Stage]:
    """Returns a model with a frozen encoder, and a stage of several groups with rates and decays of their own."""
    model = tiny_model()
    rates = {"mixture": 1e-2, "mixture.encoders.vit": None, "projector": 2e-2, "llm": 5e-3}
    stage = Stage(
        recipe="x",
        learning_rates=rates,
        max_length=256,
        rows_per_step=ROWS,
        num_steps=STEPS,
        eps=1e-4,
        weight_decay=0.1,
    )
    freeze(model, rates)
    return model, stage


def engine_of(name: str, model: nn.Module, stage: Stage) -> Engine:
    """Returns an engine; ranks beyond the rows of a step train on one that weighs nothing."""
    cls, settings = ENGINES[name]
    return cls(model, stage, max(1, ROWS // dist.world_size()), **settings)


def run(engine: Engine, steps: range) -> list[float]:
    """Takes steps; returns their losses."""
    found = []
    for step in steps:
        batches = [tiny_row([tiny_sample(ROWS * step + i, tiles=1 + (step + i) % 2)]) for i in range(ROWS)]
        weight = sum(float(row.loss_weights.sum()) for row in batches)
        mine = list(range(dist.rank(), ROWS, dist.world_size())) or [0]
        total = 0.0
        for place in mine:
            share = float(dist.rank() < ROWS)
            losses = engine.forward(batches[place]) * batches[place].loss_weights * share
            engine.backward(losses.sum() / weight, last=place == mine[-1])
            total += float(losses.detach().sum())
        found.append(dist.all_reduce_sum([total])[0] / weight)
        engine.step(1.0)
    return found


def result(engine: Engine, model: nn.Module, losses: list[float]) -> dict:
    """Returns losses and final weights, once the engine is closed."""
    engine.close()
    engine.placement.make_whole(model)
    return {"losses": losses, "weights": {n: p.detach().float().clone() for n, p in model.named_parameters()}}


def save(out: Path, names: list[str]) -> dict:
    """Trains undisturbed with every engine, and saves in the middle."""
    results = {}
    for name in names:
        folder = out / f"{name}-{dist.world_size()}"
        if dist.rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        model, stage = make()
        engine = engine_of(name, model, stage)
        losses = run(engine, range(SAVED))
        engine.save(folder)
        dist.barrier()
        results[name] = result(engine, model, losses + run(engine, range(SAVED, STEPS)))
    return results


def load(out: Path, roads: list[str]) -> dict:
    """Goes on from checkpoints in `out`; a road is `zero2-1>zero3`: that of ZeRO-2 on one rank, with ZeRO-3."""
    results = {}
    for road in roads:
        folder, _, name = road.partition(">")
        model, stage = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        engine = engine_of(name, model, stage)
        run(engine, range(1))  # what an engine has done before does not matter
        engine.load(out / folder)
        results[road] = result(engine, model, run(engine, range(SAVED, STEPS)))
    return results


def fail(out: Path, names: list[str]) -> dict:
    """Saves in the background while the last rank cannot write, and again when it can; damages the result.

    Returns:
        What was reported, and which step was found whole before and after the damage.
    """
    (name,) = names
    engine = engine_of(name, *make())
    saver = Saver(CheckpointDir(out / "failing"), background=True)
    small = {f"rng-{dist.rank():05d}": b"x"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    troubles, steps = [], []
    for step in range(1, 4):
        failing = step == 2 and dist.rank() == dist.world_size() - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000 if failing else soft, hard))
        report = saver.save(engine, step, small, wait=False)
        while report.trouble is None and not report.published:
            run(engine, range(1))
            saver.poll()
        troubles.append(report.trouble)
    steps.append(saver.checkpoints.latest().name)
    damaged = saver.checkpoints.path(3) / f"state-{dist.rank():05d}-of-{dist.world_size():05d}.safetensors"
    if dist.rank() == dist.world_size() - 1:
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
    dist.barrier()
    steps.append(saver.checkpoints.latest().name)
    engine.close()
    return {"troubles": dist.gather_objects(troubles), "steps": dist.gather_objects(steps)}


def main(out: Path, *tasks: str) -> None:
    """Runs tasks one after another, each a word and what it is for: `save:plain,zero2`."""
    dist.init(timeout_seconds=60)
    for task in tasks:
        word, _, names = task.partition(":")
        results = {"save": save, "load": load, "fail": fail}[word](out, names.split(","))
        if dist.rank() == 0:
            torch.save(results, out / f"{word}-{dist.world_size()}.pt")
        dist.barrier()
    dist.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
