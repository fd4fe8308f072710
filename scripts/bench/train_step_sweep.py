"""Our step by size of the model, mixture, length of the row and attention: tokens/s, MFU, peak memory."""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch
from train_step_ours import bare, make_stage
from train_step_work import MIXTURES, make_engine, make_model, make_rows, make_samples, shapes_of

from eagle_train.model.pass_flops import StepFlops, step_flops
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.peak import peak_tflops
from eagle_train.train.assemble import meta_model
from eagle_train.train.config import build, load_choice, options
from eagle_train.train.engine import PlainEngine
from eagle_train.types import PackedBatch

STEPS = 2
"""Of a case, after the first, which chooses kernels and allocates memory."""
GIB = 2**30


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the cases one after another, the small ones first; prints and returns each, also those that are skipped."""
    end = time.monotonic() + 60 * args.minutes
    results = []
    for mixture in MIXTURES:
        for size in args.sizes:
            if time.monotonic() > end:
                results.append(told({"size": size, "mixture": mixture, "skipped": "no time left"}))
                continue
            results += sweep_model(size, mixture, args, end)
            gc.collect()
            torch.cuda.empty_cache()
    return results


def sweep_model(size: str, mixture: str, args: argparse.Namespace, end: float) -> list[dict[str, Any]]:
    """Runs one model over rows and attentions."""
    name = {"size": size, "mixture": mixture}
    try:
        model, config = make_model(size, mixture)
        flops = step_flops(meta_model(config).requires_grad_(True), config["data"]["tile_size"], recomputed=True)
        stage = make_stage(1, max(args.lengths))
        engine = make_engine(model, stage, activation_checkpointing=True, activation_offload=args.offload)
    except torch.OutOfMemoryError as error:
        return [told(name | {"skipped": short(error)})]
    results = []
    for length in args.lengths:
        rows = rows_of(model, config["data"]["tile_size"], length, 1 + STEPS)
        for attention in attentions(args):
            case = name | {"row": length, "attention": attention}
            if time.monotonic() > end:
                results.append(told(case | {"skipped": "no time left"}))
                continue
            try:
                model.attention = build(load_choice("attention", attention))
                results.append(told(case | measured(engine, rows, flops, args.peak_tflops)))
            except (torch.OutOfMemoryError, ValueError, ImportError, NotImplementedError) as error:
                results.append(told(case | {"skipped": short(error)}))
            engine.optimizer.zero_grad()
    return results


def attentions(args: argparse.Namespace) -> list[str]:
    """Returns the names of the attention of packed rows that are asked for, or all there are."""
    return args.attention or [name for name in options("attention") if name != "auto"]


def rows_of(model: VisionLanguageModel, tile_size: int, length: int, count: int) -> list[PackedBatch]:
    """Returns `count` full rows of samples of the tiled 1.8M mix."""
    per_tile = model.mixture.tokens_per_tile
    shapes = shapes_of("eagle1_tiled", length, per_tile, max(16, 4 * count * length // 1500), 1)
    kept, total = [], 0
    for shape in shapes:
        if total + shape.tokens > 1.2 * count * length:
            break
        kept.append(shape)
        total += shape.tokens
    rows = make_rows(make_samples(kept, model, tile_size), length, tile_size)
    return sorted(rows, key=lambda row: -row.num_tokens)[:count]


def measured(
    engine: PlainEngine, rows: list[PackedBatch], flops: StepFlops, peak: float | None
) -> dict[str, float | None]:
    """Returns the speed and the memory of steps over all rows but the first."""
    device = engine.device
    stage = make_stage(len(rows), max(row.num_tokens for row in rows))
    bare(engine, stage, rows[:1])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak = peak or peak_tflops(torch.cuda.get_device_name(device))
    seconds = sum(bare(engine, stage, rows[1:]))
    tokens = sum(row.num_tokens for row in rows[1:])
    useful, executed = (sum(values) / seconds / 1e12 for values in zip(*map(flops.of, rows[1:]), strict=True))
    return {
        "tokens_per_second": tokens / seconds,
        "tiles_per_second": sum(row.num_images for row in rows[1:]) / seconds,
        "tflops": useful,
        "mfu": useful / peak if peak else None,
        "hfu": executed / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None,
    }


def told(case: dict[str, Any]) -> dict[str, Any]:
    """Prints a case and returns it."""
    shown = (f"{name} {value:,.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in case.items())
    print(" | ".join(shown), flush=True)
    return case


def short(error: Exception) -> str:
    """Returns the first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
