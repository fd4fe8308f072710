"""Peak memory of one row by its length: estimated on the meta device, and measured where a device is named.

    python scripts/bench/memory.py +experiment=toy --measure cpu
    python scripts/bench/memory.py +experiment=eagle-x5-13b --lengths 4 8 16 --ranks 32
    python scripts/bench/memory.py +experiment=eagle2.5-8b --ranks 8 --memory 80 --measure cuda

Arguments that are no options are overrides of the config. Each way of sparing memory runs the real forward and
backward pass of the model in training, as its last stage trains it, on one sample that fills the row. Activations
are all that lives at the peak but parameters and their gradients; weights, gradients and optimizer state are what
the experiment's engine holds per rank. What kernels take for themselves, what the allocator loses and what the
driver and communication hold (a few GiB on a GPU) come on top. Measured is what the process (CPU) or torch's
allocator (GPU) held at the peak beyond what it held before; what is offloaded stays in the process of a CPU, so there
the estimate of the host's memory counts too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from encoders import circumstances
from machine import forget_peak, memory_mib
from torch import nn

from eagle_train.model.memory import LiveBytes, activation_bytes, forget_gradient, meta_row
from eagle_train.train.assemble import build_model, build_schedule, meta_model
from eagle_train.train.config import build, constructor, load_config
from eagle_train.train.engine import spare_activations
from eagle_train.train.optim import freeze
from eagle_train.train.row_memory import weight_dtype
from eagle_train.types import IGNORE_INDEX, PackedBatch

GIB, MIB = 2**30, 2**20
M_MMAP_THRESHOLD = -3
"""glibc's number of the option."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """What is done to hold less."""

    name: str
    recomputed: bool
    micro_batch: int | None
    offload: bool
    mlp_tile: int | None


def ways(micro_batch: int, mlp_tile: int) -> list[Way]:
    """Returns the ways to run, each sparing more than the one before."""
    kept = Way(name="all kept", recomputed=False, micro_batch=None, offload=False, mlp_tile=None)
    recomputed = replace(kept, name="recomputed", recomputed=True)
    micro = replace(recomputed, name="and tiles in micro-batches", micro_batch=micro_batch)
    offloaded = replace(micro, name="and offloaded", offload=True)
    return [kept, recomputed, micro, offloaded, replace(offloaded, name="and MLPs in tiles", mlp_tile=mlp_tile)]


def prepared(model: nn.Module, config: Mapping[str, Any], way: Way) -> nn.Module:
    """Returns a model as the last stage trains it, in the dtype of the engine's weights."""
    freeze(model, list(build_schedule(config).values())[-1].learning_rates)
    model.mixture.micro_batch = way.micro_batch
    spare_activations(model, way.recomputed, way.offload, way.mlp_tile)
    return model.train().to(weight_dtype(config))


def state_bytes(model: nn.Module, config: Mapping[str, Any], ranks: int) -> dict[str, int]:
    """Returns bytes per rank of weights, gradients and optimizer state."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    engine = {key: value for key, value in config["engine"].items() if not key.startswith("_")}
    return constructor(config["engine"]).state_bytes(total, trainable, ranks, **engine)


def real(row: PackedBatch, vocabulary: int, device: str) -> PackedBatch:
    """Returns a row like that of the meta device, with values, on a device: the first tokens are visual."""
    length = row.num_tokens
    ids = torch.arange(length) % vocabulary
    labels = torch.full((length,), IGNORE_INDEX)
    labels[-row.num_targets :] = ids[-row.num_targets :]
    values = {
        "input_ids": ids,
        "labels": labels,
        "loss_weights": (labels >= 0).float(),
        "position_ids": torch.arange(length),
        "image_positions": torch.arange(len(row.image_positions)),
        "pixels": torch.zeros(row.pixels.shape, dtype=torch.uint8),
    }
    return replace(row, **values).to(torch.device(device))


def measured_bytes(model: nn.Module, row: PackedBatch) -> int:
    """Returns the bytes held at the peak of a pass beyond those held before; no gradient of a parameter is kept."""
    device = row.pixels.device
    hooks = [p.register_post_accumulate_grad_hook(forget_gradient) for p in model.parameters() if p.requires_grad]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(row).sum().backward()
        held = torch.cuda.max_memory_allocated(device) - before
    else:
        # Every tensor gets pages of its own, given back when it is freed: else the peak is that of the heap's holes.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 14)
        forget_peak()
        before = memory_mib("VmRSS")
        model(row).sum().backward()
        held = int((memory_mib("VmHWM") - before) * MIB)
    for hook in hooks:
        hook.remove()
    return held


def run_way(config: Mapping[str, Any], way: Way, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns what each length takes in one way."""
    model = prepared(meta_model(config), config, way)
    state = state_bytes(model, config, args.ranks)
    on_device = sum(size for part, size in state.items() if part != "host")
    tokens_per_tile, tile_size = model.mixture.tokens_per_tile, config["data"]["tile_size"]
    row_of = partial(meta_row, tokens_per_tile=tokens_per_tile, tile_size=tile_size, example=model.mixture.example)
    there = None
    if args.measure:
        there = prepared(build_model(config), config, way).to(args.measure)
        small = row_of(tokens_per_tile + 64, num_tiles=1, num_targets=32)
        measured_bytes(there, real(small, model.llm.config.vocab_size, args.measure))  # libraries warm up
    results = []
    for length in (1024 * thousands for thousands in args.lengths):
        tiles = int(args.visual * length) // tokens_per_tile
        targets = int(args.targets * length)
        row = row_of(length, num_tiles=tiles, num_targets=targets)
        with LiveBytes("cpu") as host:
            activations = activation_bytes(model, row)
        result = {"tokens": length, "tiles": tiles, "activations": activations, "offloaded": host.peak}
        if there is not None:
            result["measured"] = measured_bytes(there, real(row, model.llm.config.vocab_size, args.measure))
            seen = activations + (host.peak if args.measure == "cpu" else 0)
            result["estimate_over_measured"] = seen / result["measured"]
        results.append(result | state | {"total": result["activations"] + on_device})
        print(line(way, results[-1], args.memory), flush=True)
    return results


def line(way: Way, result: Mapping[str, Any], memory: float) -> str:
    """Returns one line of the table."""
    activations, total = result["activations"], result["total"]
    cells = [
        f"{way.name:<26}",
        f"{result['tokens'] // 1024:4d}K tokens {result['tiles']:4d} tiles",
        f"activations {activations / GIB:8.3f} GiB",
        f"{activations / MIB / (result['tokens'] / 1024):8.2f} MiB per 1K tokens",
        f"on the host {result['offloaded'] / GIB:7.3f} GiB",
        f"with state {total / GIB:8.2f} GiB: {'fits' if total <= memory * 1e9 else 'too much'}",
    ]
    if "measured" in result:
        ratio = result["estimate_over_measured"]
        cells.append(f"measured {result['measured'] / GIB:8.3f} GiB, estimate x{ratio:.3f}")
    return " | ".join(cells)


def main() -> None:
    """Estimates, measures, and prints a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="+experiment=NAME and other overrides of the config")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128], help="in 1024 tokens")
    parser.add_argument("--visual", type=float, default=0.75, help="share of visual tokens")
    parser.add_argument("--targets", type=float, default=0.25, help="share of positions with loss")
    parser.add_argument("--micro-batch", type=int, default=1, help="tiles that encoders see at once, where they do")
    parser.add_argument("--mlp-tile", type=int, default=4096, help="tokens that MLPs work on at once, where they do")
    parser.add_argument("--ranks", type=int, default=1, help="over which the engine shards")
    parser.add_argument("--memory", type=float, default=80.0, help="of a device, in GB, 1e9 bytes")
    parser.add_argument("--measure", choices=["cpu", "cuda"], help="run on this device too")
    parser.add_argument("--ways", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="which, in the table's order")
    args = parser.parse_args()
    facts = circumstances(args.measure or "cpu")
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    config = load_config(args.overrides)
    model = prepared(meta_model(config), config, ways(args.micro_batch, args.mlp_tile)[0])
    state = state_bytes(model, config, args.ranks)
    held = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in state.items())
    loss = build(config["loss"])
    print(f"per rank of {args.ranks}: {held}; weights {weight_dtype(config)}, loss {type(loss).__name__}", flush=True)
    chosen = [ways(args.micro_batch, args.mlp_tile)[place] for place in args.ways]
    results = [asdict(way) | {"rows": run_way(config, way, args)} for way in chosen]
    print(json.dumps(facts | {"arguments": vars(args), "results": results}))


if __name__ == "__main__":
    main()
