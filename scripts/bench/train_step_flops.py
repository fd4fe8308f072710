"""FLOPs of packed and of padded training by part of the model, for train_step.py: what a ratio of speeds is made of.

    python scripts/bench/train_step_flops.py --sizes toy 0.5b 7b       # no weights are made, no step is taken

Padded counts what padding, whole attention, logits of all positions and black images cost. Kernels differ in speed, so
that FLOPs predict no seconds; what they say is which share of a model the toy has too much or too little of. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.utils.data import Sampler
from torch.utils.flop_counter import FlopCounterMode
from train_step_padded import GROUPINGS, ModalityGrouped
from train_step_work import (
    MIXTURES,
    SIZES,
    Shape,
    batch_of,
    longest_of,
    make_samples,
    scale_of,
    shapes_of,
    supervised,
    toy_grid,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import meta_model
from eagle_train.train.config import load_config

PARTS = ("layers", "head", "attention", "vision")


def packed_flops(model: VisionLanguageModel, tile_size: int, shapes: Sequence[Shape], targets: int) -> dict[str, float]:
    """Returns the FLOPs of a forward pass by part.

    Attention is causal and within samples; the head and the last layer's MLP treat tokens with a label.
    """
    tokens, tiles = sum(shape.tokens for shape in shapes), sum(shape.tiles for shape in shapes)
    squares = sum(shape.tokens**2 for shape in shapes) / 2
    found = by_part(model, tile_size, tokens=tokens, logits=targets, squares=squares, tiles=tiles)
    passed_over = sum(p.numel() for p in model.llm.model.layers[-1].mlp.parameters() if p.dim() == 2)
    return found | {"layers": found["layers"] - 2.0 * passed_over * (tokens - targets)}


def padded_flops(model: VisionLanguageModel, tile_size: int, batches: Iterable[Sequence[Shape]]) -> dict[str, float]:
    """Returns the same of batches padded to their longest: masked attention, all logits, a black tile for a text."""
    places = [(len(batch), max(shape.tokens for shape in batch)) for batch in batches]
    tokens, squares = sum(n * longest for n, longest in places), sum(n * longest**2 for n, longest in places)
    tiles = sum(max(1, shape.tiles) for batch in batches for shape in batch)
    return by_part(model, tile_size, tokens=tokens, logits=tokens, squares=squares, tiles=tiles)


def by_part(
    model: VisionLanguageModel, tile_size: int, *, tokens: int, logits: int, squares: float, tiles: int
) -> dict[str, float]:
    """Returns FLOPs of a forward pass, 2 per multiply-add; the backward pass has twice as many in every part.

    Args:
        model: on the meta device.
        squares: products of queries and keys, summed over samples.
    """
    config = model.llm.config
    matrices = sum(p.numel() for p in model.llm.model.layers.parameters() if p.dim() == 2)
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.see(torch.empty(1, 3, tile_size, tile_size, dtype=torch.uint8, device="meta"))
    return {
        "layers": 2.0 * matrices * tokens,
        "head": 2.0 * config.vocab_size * config.hidden_size * logits,
        "attention": 4.0 * width * config.num_hidden_layers * squares,
        "vision": float(counter.get_total_flops() * tiles),
    }


def batches_of(shapes: Sequence[Shape], order: Iterable[int], batch_size: int) -> list[list[Shape]]:
    """Returns the shapes in batches, in an order of them."""
    ordered = [shapes[place] for place in order]
    return [ordered[begin : begin + batch_size] for begin in range(0, len(ordered), batch_size)]


def compare(size: str, mix: str, count: int) -> dict[str, Mapping[str, float]]:
    """Returns FLOPs by part, packed and by way of grouping."""
    toy = [f"mixture.grid={toy_grid(mix)}"] if size == "toy" else MIXTURES["siglip"]
    config = load_config([*SIZES[size], *toy])
    model, tile_size = meta_model(config), config["data"]["tile_size"]
    scale = scale_of(size)
    shapes = shapes_of(mix, longest_of(mix, scale), model.mixture.tokens_per_tile, count, scale)
    samples = make_samples(shapes, model, 1)
    batch_size = batch_of(shapes, 4096 if size == "toy" else 16_384)
    generator = torch.Generator().manual_seed(0)
    lengths = [shape.tokens for shape in shapes]
    orders: dict[str, Sampler] = {
        "transformers": LengthGroupedSampler(batch_size, lengths=lengths, generator=generator),
        "llava": ModalityGrouped(samples, batch_size),
    }
    found = {"packed": packed_flops(model, tile_size, shapes, supervised(samples))}
    for name in GROUPINGS:
        found[name] = padded_flops(model, tile_size, batches_of(shapes, orders[name], batch_size))
    return found


def main() -> None:
    """Prints shares and ratios, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["toy", "0.5b", "7b"])
    parser.add_argument("--mixes", nargs="+", default=["eagle1_sft", "eagle1_tiled"])
    parser.add_argument("--samples", type=int, default=1500)
    args = parser.parse_args()
    result = {}
    for mix in args.mixes:
        for size in args.sizes:
            result[f"{mix} {size}"] = found = compare(size, mix, args.samples)
            packed = sum(found["packed"].values())
            for name, parts in found.items():
                total = sum(parts.values())
                shares = "  ".join(f"{part} {parts[part] / total:5.1%}" for part in PARTS)
                print(f"{mix:<13} {size:<5} {name:<13} {shares}  x{total / packed:.2f}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
