"""`python -m tests.sequence_ranks OUT`: what, on four ranks, groups of two and of four make of rows they share.

Rank 0 writes what became of each case; `tests/test_sequence.py` compares it with one process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from eagle_train import dist
from eagle_train.model.prealign import PreAlignment
from eagle_train.model.projector import MlpProjector
from eagle_train.train.engine import Engine, PlainEngine
from eagle_train.train.optim import freeze
from eagle_train.train.schedule import Stage
from eagle_train.train.sequence.rows import RowGroups, own_part
from eagle_train.train.zero.engine import ZeroEngine
from eagle_train.types import PackedBatch
from tests.toys import tiny_model, tiny_row, tiny_sample

TILES = {
    # The samples of both rows of a step: (tiles, text tokens) each.
    "mixed": ([(1, 9), (0, 21), (3, 12), (0, 4)], [(0, 13), (2, 17)]),
    "no_images": ([(0, 30), (0, 7)], [(0, 12)]),
    "one_long_sample": ([(0, 3), (5, 60), (0, 3)], [(2, 50)]),
    "many_short_samples": ([(i % 3 == 0, 3 + i % 4) for i in range(14)], [(0, 3)] * 9),
    "images_at_the_end": ([(0, 41), (2, 6)], [(0, 40), (1, 3)]),
    "few_tokens": ([], [(0, 3)]),  # an empty row, and one that four ranks can hardly share
    "images_in_one_row": ([(4, 15)], [(0, 15)]),
}
LLMS = {
    "one_kv_head": {"num_key_value_heads": 1},
    "two_kv_heads": {"num_key_value_heads": 2},
    "four_kv_heads": {"num_key_value_heads": 4},
    "heads_that_straddle": {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3},
    "heads_shared_unequally": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2},
}
# (rows, LLM, ranks of a group); groups of two leave each of the two groups a row.
CASES = [(tiles, "two_kv_heads", 4) for tiles in TILES]
CASES += [("mixed", llm, 4) for llm in LLMS if llm != "two_kv_heads"]
CASES += [("mixed", "one_kv_head", 2), ("images_in_one_row", "two_kv_heads", 2)]
ENGINES = {
    "recomputed": (PlainEngine, {"activation_checkpointing": True, "activation_offload": True, "mlp_tile": 5}),
    "zero2": (ZeroEngine, {"zero_stage": 2}),
    "zero3": (
        ZeroEngine,
        {"zero_stage": 3, "persistence_threshold": 0, "activation_checkpointing": True, "mlp_tile": 5},
    ),
}
TRAINED = [("recomputed", 4), ("zero2", 2), ("zero3", 2), ("zero3", 4)]
STEPS = ("mixed", "few_tokens", "images_in_one_row", "no_images")
ALIGNED = {"mixture": None, "mixture.encoders.vit": 1e-2, "projector": None, "llm": None, "aligner": 1e-2}
MLP_ALONE = {"mixture": None, "projector": None, "llm": None, "llm.model.layers.0.mlp": 1e-2}
STAGE = Stage(
    recipe="x",
    learning_rates={"mixture": 1e-2, "projector": 1e-2, "llm": 1e-2},
    max_length=256,
    rows_per_step=2,
    num_steps=len(STEPS),
    eps=1e-4,  # so that Adam does not blow up the rounding of gradients that are zero
)


def rows(tiles: str) -> list[PackedBatch]:
    """Returns the two rows of a step."""
    return [
        tiny_row([tiny_sample(10 * place + i, tiles=int(n), text=text) for i, (n, text) in enumerate(samples)])
        for place, samples in enumerate(TILES[tiles])
    ]


def accumulate(engine: Engine, tiles: str, groups: RowGroups) -> list[float]:
    """Runs a step's rows forward and backward; returns the loss, tokens, tiles and weights of all, as ranks count."""
    whole = rows(tiles)
    weight = sum(float(row.loss_weights.sum()) for row in whole)
    mine = [own_part(row, groups.index, groups.size) for row in whole[groups.data_rank :: groups.data_world_size]]
    counts = [0.0] * 4
    for place, row in enumerate(mine):
        losses = engine.forward(row) * row.loss_weights
        engine.backward(losses.sum() / weight, last=place == len(mine) - 1)
        found = (float(losses.detach().sum()) / weight, row.num_tokens, row.num_images, float(row.loss_weights.sum()))
        counts = [count + more for count, more in zip(counts, found, strict=True)]
    return dist.all_reduce_sum(counts)


def gradients_of(tiles: str, llm: str, size: int, **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns counts, and gradients by name summed over ranks, of plain torch."""
    model = tiny_model(**LLMS[llm])
    model.mixture.micro_batch = 1  # ranks encode tiles in unlike numbers of pieces
    engine = PlainEngine(model, STAGE, 1, sequence_parallel=size, **settings)
    counts = accumulate(engine, tiles, groups_of(size))
    engine.close()
    return counts, {name: p.grad for name, p in model.named_parameters()}


def groups_of(size: int) -> RowGroups:
    """Returns this rank's place in groups of `size`."""
    return RowGroups(rank=dist.rank(), world_size=dist.world_size(), size=size)


def trained(
    engine_name: str, size: int, *, rates: Mapping[str, float | None] = STAGE.learning_rates
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns gradient norms and final weights of some steps of an engine."""
    model, stage = tiny_model(), replace(STAGE, learning_rates=rates)
    freeze(model, rates)
    kind, settings = ENGINES[engine_name]
    engine = kind(model, stage, 2 // groups_of(size).data_world_size, sequence_parallel=size, **settings)
    norms = []
    for tiles in STEPS:
        accumulate(engine, tiles, groups_of(size))
        norms.append(engine.step(1.0)[1])
    engine.close()
    engine.placement.make_whole(model)
    return norms, model.state_dict()


def aligned(size: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns counts and gradients of a stage of pre-alignment."""
    torch.manual_seed(1)
    model = PreAlignment(tiny_model(), "vit", MlpProjector)
    stage = replace(STAGE, learning_rates=ALIGNED, align="vit")
    freeze(model, stage.learning_rates)
    engine = PlainEngine(model, stage, 1, sequence_parallel=size)
    counts = accumulate(engine, "mixed", groups_of(size))
    engine.close()
    return counts, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def main(out: Path) -> None:
    """Runs all cases."""
    dist.init(timeout_seconds=60)
    results = {}
    for tiles, llm, size in CASES:
        results[f"{tiles}/{llm}/{size}"] = gradients_of(tiles, llm, size)
    for name, size in TRAINED:
        results[f"{name}/{size}"] = trained(name, size)
    results["mlp"] = trained("zero3", 2, rates=MLP_ALONE)
    results["aligned"] = aligned(4)
    if dist.rank() == 0:
        torch.save(results, out / "results.pt")
    dist.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
