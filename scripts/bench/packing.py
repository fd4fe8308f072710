"""Fill, balance, time and memory of packing, beside the policies of other trainers on the same samples.

    python scripts/bench/packing.py
    python scripts/bench/packing.py --mixes eagle2_sft --capacities 16384 --window-rows 1024 4096 16384

The mixes are drawn as lengths.py says; of a large one only as many samples as fill `--rows` rows, but a million at
most. Costs are FLOPs of forward and backward, all parts training: for eagle1_sft those of Eagle-X5-13B, for the
others those of Eagle 2-9B. For each mix, length of row and packer:

fill     tokens of samples over tokens of rows, and `of bound`: over the fill that no packing of all samples can pass.
step R   over 64 ranks and steps of R rows, cost of the costliest rank over the mean: mean, 99th percentile, largest;
         and `waits`, where ranks wait for each other after each micro-batch: the sum of its largest over the mean.
alike    standard deviation over mean, of the rows' costs and of their numbers of samples.
time     processor seconds of one core for a million samples; ours reads its layout files, shuffles and balances.

Ours is the real plan, from layout files in a temporary folder to the steps that training takes. First it is made of
all 1.8M samples of eagle1_sft. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from layouts import open_layouts, write_layouts
from lengths import MIXES, Lengths, lengths_of
from machine import circumstances, forget_peak, memory_mib
from packers import PEERS, Packed, fewest_rows

from eagle_train.data.balance import CostModel, deal
from eagle_train.data.catalog import Catalog
from eagle_train.data.plan import PlanConfig
from eagle_train.data.stream import steps

WORLD = 64
STEPS = (64, 256)
"""Rows of a step."""
# Parameters that multiply: without input embeddings. A multiplication and an addition are two FLOPs, backward is twice
# forward; a causal score needs half of the square.
EAGLE2_9B = CostModel(
    per_token=6 * 6.32e9,  # Qwen2.5-7B
    per_target=6 * 0.75e9,  # its head and last MLP
    per_token_squared=6 * 28 * 3584,
    per_tile=6 * 413e6 * 1024 + 12 * 27 * 1152 * 1024**2,  # SigLIP so400m, 1024 patches
)
# Teraflops forward at 1024 pixels (CLIP 448): CLIP-L 0.7, ConvNeXt-XXL 6.3, SAM-L 2.8, EVA-02-L 2.8, Pix2Struct-L 5.9.
EAGLE_X5_13B = CostModel(
    per_token=6 * 12.47e9, per_token_squared=6 * 40 * 5120, per_target=6 * 0.38e9, per_tile=3 * 18.5e12
)


def ours(
    catalog: Catalog, model: CostModel, capacity: int, window_rows: int, rows_per_step: int
) -> Iterator[list[np.ndarray]]:
    """Yields the rows of each step of an epoch, as training takes them."""
    config = PlanConfig(
        max_length=capacity,
        rows_per_step=rows_per_step,
        window_rows=window_rows,
        repeats=(Fraction(1),) * len(catalog.sources),
        num_epochs=1,
        cost=model,
    )
    for step in steps(catalog, config):
        yield list(step.rows)


def joined(parts: Iterable[list[np.ndarray]]) -> Packed:
    """Returns the rows of all steps."""
    rows = [row for part in parts for row in part]
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


@contextmanager
def on_disk(data: Lengths) -> Iterator[Path]:
    """Yields a temporary folder with the layouts of samples."""
    with tempfile.TemporaryDirectory() as folder:
        write_layouts(data, Path(folder))
        yield Path(folder)


def imbalance(costs: np.ndarray, rows_per_step: int, dealt: bool) -> dict[str, float]:
    """Returns the costliest rank over the mean, by step, with rows dealt to ranks or simply in turn."""
    steps = costs[: len(costs) // rows_per_step * rows_per_step].reshape(-1, rows_per_step)
    if not len(steps):
        return {}
    if dealt:
        steps = np.stack([step[np.array(deal(step, WORLD)).T.ravel()] for step in steps])
    micro_batches = steps.reshape(len(steps), -1, WORLD)
    means = steps.sum(axis=1) / WORLD
    ratios = micro_batches.sum(axis=1).max(axis=1) / means
    return {
        "mean": float(ratios.mean()),
        "p99": float(np.percentile(ratios, 99)),
        "max": float(ratios.max()),
        "waits": float((micro_batches.max(axis=2).sum(axis=1) / means).mean()),
    }


def judged(data: Lengths, model: CostModel, capacity: int, packed: Packed) -> tuple[dict[str, Any], np.ndarray]:
    """Returns what a packing is worth and the rows' costs; refuses one that loses a sample or overfills a row."""
    samples, offsets = packed
    tokens = np.add.reduceat(data.tokens[samples], offsets[:-1])
    assert np.array_equal(np.sort(samples), np.arange(len(data.tokens))) and tokens.max() <= capacity
    costs = model.sample_costs(data.tokens, data.tiles, num_targets=data.targets)
    costs = np.add.reduceat(costs[samples], offsets[:-1])
    sizes = np.diff(offsets)
    worth = {
        "rows": len(tokens),
        "fill": float(tokens.sum() / (len(tokens) * capacity)),
        "cost_spread": float(costs.std() / costs.mean()),
        "count_spread": float(sizes.std() / sizes.mean()),
    }
    return worth, costs


def compare(mix: str, capacity: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of all packers on one mix, and prints them."""
    model = EAGLE_X5_13B if mix == "eagle1_sft" else EAGLE2_9B
    mean = lengths_of(mix, capacity, 0.01).tokens.mean()
    total = 1_813_000 if mix.startswith("eagle1") else 4_600_000
    share = min(1.0, args.rows * capacity / mean / total, args.samples / total)
    data = lengths_of(mix, capacity, share)
    bound = data.tokens.sum() / capacity / fewest_rows(data.tokens, capacity)
    print(f"\n{mix}, rows of {capacity}: {len(data.tokens)} samples, fill at most {bound:.4f}")
    results: dict[str, Any] = {}
    with on_disk(data) as folder:
        for window_rows in args.window_rows:
            for rows_per_step in STEPS:
                start = time.process_time()
                packed = joined(ours(open_layouts(folder), model, capacity, window_rows, rows_per_step))
                seconds = time.process_time() - start
                found, costs = judged(data, model, capacity, packed)
                result = results.setdefault(f"ours, window {window_rows}", found)
                result["seconds_per_million"] = seconds / len(data.tokens) * 1e6
                result[f"step {rows_per_step}"] = imbalance(costs, rows_per_step, dealt=True)
    order = np.random.default_rng(1).permutation(len(data.tokens))
    for name in args.peers:
        start = time.process_time()
        samples, offsets = PEERS[name](data.tokens[order], data.tiles[order], capacity)
        seconds = time.process_time() - start
        results[name], costs = judged(data, model, capacity, (order[samples], offsets))
        results[name]["seconds_per_million"] = seconds / len(data.tokens) * 1e6
        results[name] |= {f"step {size}": imbalance(costs, size, dealt=False) for size in STEPS}
    for name, result in results.items():
        print(report_line(name, result, bound), flush=True)
    return {"samples": len(data.tokens), "bound": bound, "packers": results}


def report_line(name: str, result: dict[str, Any], bound: float) -> str:
    """Returns one line of the table."""
    steps = []
    for size in STEPS:
        if found := result[f"step {size}"]:
            three = " ".join(f"{found[key]:.3f}" for key in ("mean", "p99", "max"))
            steps.append(f"step {size}: {three}" + (f" waits {found['waits']:.3f}" if size > WORLD else ""))
    return (
        f"  {name:<26} fill {result['fill']:.4f} ({result['fill'] / bound:.4f} of bound) | {' | '.join(steps)} | "
        f"alike {result['cost_spread']:.3f} {result['count_spread']:.2f} | {result['rows']} rows | "
        f"{result['seconds_per_million']:.2f} s"
    )


def whole_plan(window_rows: int, capacity: int) -> dict[str, float]:
    """Returns seconds and MiB of planning all of eagle1_sft from its files, and seconds to its first row."""
    with on_disk(lengths_of("eagle1_sft", capacity)) as folder:
        forget_peak()
        before = memory_mib("VmHWM")
        start, wall, first = time.process_time(), time.perf_counter(), 0.0
        catalog = open_layouts(folder)
        parts = []
        for part in ours(catalog, EAGLE_X5_13B, capacity, window_rows, STEPS[1]):
            first = first or time.perf_counter() - wall
            parts += part  # all rows are kept, which training does not do
        return {
            "samples": len(catalog),
            "rows": len(parts),
            "seconds": time.process_time() - start,
            "first_row_seconds": first,
            "growth_mib": memory_mib("VmHWM") - before,
        }


def main() -> None:
    """Plans the 1.8M samples, compares packers on each mix, prints tables, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--capacities", nargs="+", type=int, default=[4096, 16_384, 36_864, 131_072])
    parser.add_argument("--window-rows", nargs="+", type=int, default=[4096])
    parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=list(PEERS))
    parser.add_argument("--rows", type=int, default=16_384, help="rows' worth of samples of a mix")
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples of a mix at most")
    args = parser.parse_args()
    facts = circumstances()
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    plans = {}
    for capacity in args.capacities:
        plans[capacity] = plan = whole_plan(args.window_rows[0], capacity)
        print(
            f"whole plan, rows of {capacity}: {plan['samples']} samples, {plan['rows']} rows, "
            f"{plan['seconds']:.1f} s, first row after {plan['first_row_seconds']:.2f} s, "
            f"memory grown by {plan['growth_mib']:.0f} MiB",
            flush=True,
        )
    results = {mix: {cap: compare(mix, cap, args) for cap in args.capacities} for mix in args.mixes}
    print(json.dumps(facts | {"plans": plans, "results": results}))


if __name__ == "__main__":
    main()
