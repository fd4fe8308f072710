"""`python -m tests.equality_ranks OUT [WAY ...]` on any number of ranks: the same steps in many ways of running them.

Rank 0 writes what became of each way; `tests/test_equality.py` compares it with plain torch on one rank.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from eagle_train import dist
from eagle_train.train.engine import Engine, PlainEngine
from eagle_train.train.freeze_proof import FreezeProof
from eagle_train.train.optim import freeze
from eagle_train.train.placement import Construction
from eagle_train.train.schedule import Stage
from eagle_train.train.zero.engine import ZeroEngine
from eagle_train.types import PackedBatch
from tests.toys import tiny_model, tiny_row, tiny_sample

STAGES = {
    "projector": Stage(
        recipe="x",
        learning_rates={"mixture": None, "projector": 1e-2, "llm": None},
        max_length=256,
        rows_per_step=6,
        num_steps=2,
        eps=1e-4,  # so that Adam does not blow up the rounding of gradients that are zero
    ),
    "all": Stage(
        recipe="x",
        learning_rates={"mixture": 2e-3, "mixture.encoders.convnext": None, "projector": 2e-3, "llm": 2e-3},
        weight_decay={"mixture": 0.0, "projector": 0.1, "llm": 0.1, "llm.lm_head": 0.01},
        max_length=256,
        rows_per_step=6,
        num_steps=4,
        eps=1e-4,
    ),
}
# Tiles of the six rows of every step: images in all, in some, in none.
TILES = [(2, 1, 1, 3, 1, 2), (1, 0, 2, 0, 1, 0), (0, 0, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0)]

SHARDED = {"zero_stage": 3, "persistence_threshold": 0, "prefetch_bucket_size": 1000}
RECOMPUTED = {"activation_checkpointing": True}
ON_HOST = {"offload_optimizer": True}
WAYS = {
    "plain": None,
    "plain recomputed": RECOMPUTED,
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero2 small buckets": {"zero_stage": 2, "reduce_bucket_size": 500, "allgather_bucket_size": 700},
    "zero2 recomputed": {"zero_stage": 2} | RECOMPUTED,
    "zero2 overlapped": {"zero_stage": 2, "overlap_comm": True},
    "zero2 optimizer on host": {"zero_stage": 2} | ON_HOST,
    "zero3": SHARDED,
    "zero3 small ones whole": {"zero_stage": 3, "persistence_threshold": 600},
    "zero3 overlapped": SHARDED | {"overlap_comm": True},
    "zero3 recomputed": SHARDED | RECOMPUTED,
    "zero3 optimizer on host": SHARDED | ON_HOST,
    "zero3 all on host": SHARDED | ON_HOST | {"offload_param": True},
    "zero3 all on host, recomputed": SHARDED
    | ON_HOST
    | RECOMPUTED
    | {"offload_param": True, "activation_offload": True, "sub_group_size": 3000},
}


def make(way: str) -> tuple[partial, Construction]:
    """Returns a way's engine, to be given model, stage and micro-batches, and the model under construction."""
    settings = WAYS[way]
    kind = PlainEngine if way.startswith("plain") else ZeroEngine
    engine = partial(kind, bf16=False, **(settings or {}))
    torch.manual_seed(0)
    placement = kind.weights(**engine.keywords)
    return partial(engine, placement=placement), Construction(tiny_model, placement, min_elements=0)


def rows(step: int) -> list[PackedBatch]:
    """Returns the rows of a step; the more tiles, the longer the text."""
    return [
        tiny_row([tiny_sample(6 * step + place, tiles=tiles, text=12 + 10 * tiles)])
        for place, tiles in enumerate(TILES[step])
    ]


def mine(step: int) -> list[PackedBatch]:
    """Returns this rank's rows of a step, as many as other ranks': where there are too few, some weigh nothing."""
    all_rows, ranks = rows(step), dist.world_size()
    filler = replace(all_rows[0], loss_weights=torch.zeros_like(all_rows[0].loss_weights))
    all_rows += [filler] * (-len(all_rows) % ranks)
    return all_rows[dist.rank() :: ranks]


def step_of(engine: Engine, step: int) -> tuple[float, float]:
    """Takes a step; returns its loss over all ranks, and the gradient norm."""
    weight = sum(float(row.loss_weights.sum()) for row in rows(step))
    batches, total = mine(step), 0.0
    for place, row in enumerate(batches):
        loss = (engine.forward(row) * row.loss_weights).sum() / weight
        engine.backward(loss, last=place == len(batches) - 1)
        total += float(loss.detach())
    return dist.all_reduce_sum([total])[0], engine.step(1.0)[1]


def run(way: str) -> dict[str, list]:
    """Trains both stages one after the other; returns losses, gradient norms and what the proofs of freezing say."""
    engine_of, construction = make(way)
    model = construction.finish()
    losses, norms, proofs = [], [], []
    for stage in STAGES.values():
        freeze(model, stage.learning_rates)
        engine = engine_of(model, stage, len(mine(0)))
        proof = FreezeProof(model, engine.placement)
        for step in range(stage.num_steps):
            loss, norm = step_of(engine, step)
            losses.append(loss)
            norms.append(norm)
            if step == 0:
                proofs.append(str(proof.check()))
        engine.close()
    engine.placement.make_whole(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return {"losses": losses, "norms": norms, "proofs": proofs, "weights": weights}


def main(out: Path, ways: list[str]) -> None:
    """Runs some ways."""
    dist.init(timeout_seconds=100)
    results = {way: run(way) for way in ways}
    if dist.rank() == 0:
        torch.save(results, out / "results.pt")
    dist.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:] or list(WAYS))
