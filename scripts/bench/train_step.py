"""Training steps side by side: our trainer, a bare PyTorch loop on the same packed rows, and padded trainers.

    python scripts/bench/train_step.py                                       # toy size on a CPU
    python scripts/bench/train_step.py --size 0.5b --row 16384 --batch 16    # on a GPU
    python scripts/bench/train_step.py --sweep --minutes 9                   # on a GPU: every size, row, attention

The samples are drawn like those of the 1.8M mix (lengths.py): `eagle1_sft`, one tile of 1024 tokens per image, at most
2048 tokens, or `eagle1_tiled`, up to 13 tiles of 256, at most 4096. Tokens, pixels and weights are random. The whole
model is trained in all cases. The toy's LLM is Qwen2.5-0.5B made 7 times narrower, with 3 layers and as large a part of
its vocabulary; its samples are 7 times shorter. So layers, attention and head have the shares of a packed forward pass
that they have there. Its encoders do not: they have as small a share as SigLIP's beside a 7B LLM. Both kinds of
trainer compute them alike, so a larger share lessens what packing gains; train_step_flops.py has the shares.
Of its 3 layers, ours computes the last MLP for tokens with a label alone: a fifth of all products, of 28 layers 2 %.

ours    the real trainer on rows that are in memory: its ledger, its metrics, console, goodput, counted FLOPs.
bare    the same model and optimizer on the same rows in a loop of ten lines. `overhead` is ours over bare, less 1.
padded  `transformers.Trainer` on the same samples, as many to a batch as make a row's worth of tokens on average, at
        most LLaVA's 16; see train_step_padded.py for the two ways to group by length.

Ours and bare take turns and swap who goes first; each step counts with the best of `--repeats`, and so does each epoch.
Seconds are processor time on a CPU, which may be shared, and time on a GPU. `--sweep` runs the bare loop alone in each
case for a few steps, layers recomputed, and says what is skipped: what does not fit, or comes after `--minutes`. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from encoders import circumstances
from train_step_ours import bare, clock, make_stage, ours
from train_step_padded import GROUPINGS, train_padded
from train_step_sweep import sweep
from train_step_work import (
    MIXTURES,
    SIZES,
    batch_of,
    longest_of,
    make_engine,
    make_model,
    make_rows,
    make_samples,
    scale_of,
    shapes_of,
    supervised,
    toy_grid,
)

from eagle_train import dist
from eagle_train.model.pass_flops import CONVENTION, step_flops
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import meta_model
from eagle_train.train.engine import PlainEngine
from eagle_train.types import EncodedSample, PackedBatch


def overhead(
    engine: PlainEngine, meta: VisionLanguageModel, tile_size: int, rows: list[PackedBatch], args: argparse.Namespace
) -> dict[str, float]:
    """Returns seconds of ours and of the bare loop for all rows, and what ours has more."""
    stage = make_stage(len(rows), args.row)
    flops = step_flops(meta, tile_size, recomputed=args.checkpointing)
    times: dict[str, list[list[float]]] = {"ours": [], "bare": []}
    bare(engine, stage, rows[:1])  # libraries warm up
    for repeat in range(args.repeats):
        for name in ("ours", "bare") if repeat % 2 else ("bare", "ours"):
            with tempfile.TemporaryDirectory() as folder:
                run = ours(engine, stage, rows, flops, Path(folder)) if name == "ours" else bare(engine, stage, rows)
            times[name].append(run)
    seconds = {name: sum(min(step) for step in zip(*runs, strict=True)) for name, runs in times.items()}
    return {**seconds, "overhead": seconds["ours"] / seconds["bare"] - 1}


def compare_padded(
    model: VisionLanguageModel, samples: list[EncodedSample], batch_size: int, repeats: int, device: torch.device
) -> dict[str, float]:
    """Returns the seconds of one epoch of each padded trainer; the best of repeats."""
    found = {}
    for grouping in GROUPINGS:
        train_padded(model, samples[: 2 * batch_size], batch_size=batch_size, grouping=grouping, now=clock(device))
        runs = [
            train_padded(model, samples, batch_size=batch_size, grouping=grouping, now=clock(device))
            for _ in range(repeats)
        ]
        found[grouping] = min(runs)
    return found


def compare(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Runs all three on the same samples; prints and returns what they made of them."""
    toy = [f"mixture.grid={toy_grid(args.mix)}"] if args.size == "toy" else []
    model, config = make_model(args.size, args.mixture, *toy)
    tile_size, per_tile = config["data"]["tile_size"], model.mixture.tokens_per_tile
    shapes = shapes_of(args.mix, args.longest, per_tile, args.samples, args.scale)
    samples = make_samples(shapes, model, tile_size)
    rows = make_rows(samples, args.row, tile_size)
    tokens, targets = sum(len(sample.input_ids) for sample in samples), supervised(samples)
    batch_size = args.batch or batch_of(shapes, args.row)
    print(
        f"{len(samples)} samples, {tokens:,} tokens, {targets:,} supervised; {len(rows)} rows of {args.row}, "
        f"{tokens / (len(rows) * args.row):.1%} full; padded batches of {batch_size}",
        flush=True,
    )
    engine = make_engine(model, make_stage(len(rows), args.row), activation_checkpointing=args.checkpointing)
    meta = meta_model(config).requires_grad_(True)
    found = overhead(engine, meta, tile_size, rows, args)
    for name in ("ours", "bare"):
        print(f"{name:<22} {found[name]:8.2f} s {tokens / found[name]:10,.0f} tokens/s", flush=True)
    print(f"overhead of the trainer over the bare loop: {found['overhead']:+.2%} (at most 3 % is asked)", flush=True)
    epochs = compare_padded(model, samples, batch_size, max(1, args.repeats - 1), device)
    rates = {"ours": targets / found["ours"]} | {name: targets / seconds for name, seconds in epochs.items()}
    ratios = {name: rates["ours"] / rates[name] for name in epochs}
    print(f"{'ours, packed':<22} {rates['ours']:10,.0f} supervised tokens/s")
    for name, ratio in ratios.items():
        print(f"{'padded, ' + name:<22} {rates[name]:10,.0f} supervised tokens/s; ours x{ratio:.2f}", flush=True)
    return {"tokens": tokens, "supervised": targets, "batch": batch_size, "seconds": found | epochs, "ratios": ratios}


def main() -> None:
    """Compares, or sweeps, and prints a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="toy")
    parser.add_argument("--mixture", choices=list(MIXTURES), default="siglip")
    parser.add_argument("--mix", choices=["eagle1_sft", "eagle1_tiled"], default="eagle1_sft")
    parser.add_argument(
        "--samples", type=int, help="384 at toy size, so that one odd padded batch counts little, else 96"
    )
    parser.add_argument("--row", type=int, default=4096, help="tokens of a packed row")
    parser.add_argument("--longest", type=int, help="leaves out longer samples")
    parser.add_argument("--scale", type=int, help="texts so many times shorter than the mix's; 7 at toy size")
    parser.add_argument(
        "--batch", type=int, default=0, help="samples of a padded batch; 0: what fills a row, at most 16"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in all cases")
    parser.add_argument("--sweep", action="store_true", help="tokens/s, MFU, memory of ours by size, mixture, row, ...")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.5b", "1.5b", "7b"], help="of the sweep")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16_384, 65_536], help="of the sweep's rows")
    parser.add_argument("--attention", nargs="+", help="of the sweep; all that are configured")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which the sweep begins no other case")
    parser.add_argument("--peak-tflops", type=float, help="of the device, where its name does not tell")
    parser.add_argument("--offload", action="store_true", help="in the sweep, layers' inputs wait in host memory")
    args = parser.parse_args()
    args.samples = args.samples or (384 if args.size == "toy" else 96)
    args.scale = args.scale or scale_of(args.size)
    args.longest = args.longest or longest_of(args.mix, args.scale)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = dist.device()
    facts = circumstances(device.type)
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()), flush=True)
    if args.sweep:
        print(f"what is counted: {CONVENTION}")
        result = {"cases": sweep(args)}
    else:
        result = compare(args, device)
    print(json.dumps(facts | {"arguments": vars(args)} | result))


if __name__ == "__main__":
    main()
