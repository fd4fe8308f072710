"""The plan of 1.8M samples dealt to 1024 ranks, on one processor: is every sample there once, and what does it cost?

    python scripts/bench/elastic.py
    python scripts/bench/elastic.py --samples 100000 --ranks 128 --rows-per-step 300

Layout files of the samples are written to a temporary folder (eagle1_sft of lengths.py, or as many of it), and the
plan made from them is the real one. A first process streams a whole epoch as every rank does, and deals each step to
all ranks; a second one goes on from the cursor in the middle on `--resume-ranks` ranks.
Checked: every sample in exactly one row, every row on exactly one rank, as many micro-batches on every rank, and the
same rows after the resume.

catalog     seconds to open it: the sums of all shards.
first step  seconds from there to the first step.
step        seconds to get a step and deal it, of wall time: mean, 99th percentile, longest. Windows are made in the
            background, so where training takes longer than planning only the first is waited for.
plan        processor seconds of the whole epoch.
memory      of a rank, in MiB: growth of what is its own (anonymous) and of the peak, which counts pages of mapped
            files too; ranks of a node share those. `files`: all layout files, of which they are pages.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from layouts import open_layouts, write_layouts
from lengths import lengths_of
from machine import circumstances, forget_peak, memory_mib
from packing import EAGLE_X5_13B

from eagle_train.data.balance import deal
from eagle_train.data.catalog import Catalog
from eagle_train.data.plan import PlanConfig
from eagle_train.data.stream import Cursor, Step, steps

MIX = "eagle1_sft"
NUM_SAMPLES = 1_813_000


def plan_config(catalog: Catalog, args: argparse.Namespace) -> PlanConfig:
    """Returns the plan of one epoch."""
    return PlanConfig(
        max_length=args.max_length,
        rows_per_step=args.rows_per_step,
        window_rows=args.window_rows,
        repeats=(Fraction(1),) * len(catalog.sources),
        num_epochs=1,
        cost=EAGLE_X5_13B,
    )


def dealt_steps(
    catalog: Catalog, config: PlanConfig, ranks: int, first: int, cursor: Cursor | None, seconds: list[float]
) -> Iterator[tuple[Step, int]]:
    """Yields each step and its empty rows, checked; the time that each took goes to `seconds`."""
    stream = steps(catalog, config, first=first, cursor=cursor)
    while True:
        start = time.perf_counter()
        step = next(stream, None)
        if step is None:
            return
        dealt = np.array(deal(step.costs, ranks))
        seconds.append(time.perf_counter() - start)
        assert dealt.shape == (ranks, -(-len(step.rows) // ranks)), "as many micro-batches on every rank"
        given = dealt[dealt >= 0]
        assert np.array_equal(np.sort(given), np.arange(len(step.rows))), "every row on one rank"
        yield step, dealt.size - len(given)


def hash_of(step: Step) -> int:
    """Returns a checksum of the rows of a step, their borders included."""
    return zlib.crc32(np.concatenate([np.append(row, -1) for row in step.rows]).tobytes())


def stream_epoch(folder: Path, args: argparse.Namespace, resume: tuple[int, Cursor] | None) -> dict[str, Any]:
    """Streams an epoch, or the rest of one, as one rank; returns figures, hashes of the steps and their cursors."""
    ranks = args.resume_ranks if resume else args.ranks
    forget_peak()
    anonymous, peak = memory_mib("RssAnon"), memory_mib("VmHWM")
    start, cpu = time.perf_counter(), time.process_time()
    catalog = open_layouts(folder)
    opened = time.perf_counter() - start
    config = plan_config(catalog, args)
    first, cursor = resume or (0, None)
    times: list[float] = []
    hashes, cursors, empty, rows, held = [], [], 0, 0, 0.0
    seen = np.zeros(len(catalog), np.uint8)
    for step, empties in dealt_steps(catalog, config, ranks, first, cursor, times):
        np.add.at(seen, np.concatenate(step.rows), 1)
        hashes.append(hash_of(step))
        cursors.append(step.after)
        empty, rows = empty + empties, rows + len(step.rows)
        held = max(held, memory_mib("RssAnon"))
    assert resume or (seen == 1).all(), "every sample once"
    return {
        "ranks": ranks,
        "steps": len(times),
        "rows": rows,
        "empty_rows": empty,
        "catalog_seconds": opened,
        "first_step_seconds": times[0],
        "step_seconds": {
            "mean": float(np.mean(times[1:])),
            "p99": float(np.percentile(times[1:], 99)),
            "max": max(times[1:]),
        },
        "plan_seconds": time.process_time() - cpu,
        "anonymous_mib": held - anonymous,
        "peak_mib": memory_mib("VmHWM") - peak,
        "hashes": hashes,
        "cursors": cursors,
    }


def report(name: str, found: dict[str, Any]) -> None:
    """Prints the figures of one process."""
    mean, p99, longest = (found["step_seconds"][key] * 1e3 for key in ("mean", "p99", "max"))
    parts = [
        f"{name}: {found['steps']} steps, {found['rows']} rows on {found['ranks']} ranks, {found['empty_rows']} empty",
        f"catalog {found['catalog_seconds']:.2f} s, first step {found['first_step_seconds']:.2f} s",
        f"step {mean:.1f} ms, p99 {p99:.1f} ms, longest {longest:.0f} ms",
        f"plan {found['plan_seconds']:.1f} s",
        f"memory {found['anonymous_mib']:.0f} MiB its own, peak +{found['peak_mib']:.0f} MiB",
    ]
    print(" | ".join(parts), flush=True)


def main() -> None:
    """Writes the layouts, streams an epoch, resumes in the middle; prints figures, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--resume-ranks", type=int, default=768, help="ranks after the resume")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rows-per-step", type=int, default=2048)
    parser.add_argument("--window-rows", type=int, default=4096)
    args = parser.parse_args()
    facts = circumstances()
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as p:
        root = Path(folder)
        data = lengths_of(MIX, args.max_length, args.samples / NUM_SAMPLES)
        write_layouts(data, root)
        size = sum(path.stat().st_size for path in root.rglob("*.arrow")) / 2**20
        print(f"{len(data.tokens)} samples in {data.shards[-1] + 1} shards, layout files of {size:.0f} MiB")
        whole = p.apply(stream_epoch, (root, args, None))
        fill = data.tokens.sum() / (whole["rows"] * args.max_length)
        report("whole epoch", whole)
        middle = whole["steps"] // 2
        rest = p.apply(stream_epoch, (root, args, (middle, whole["cursors"][middle - 1])))
        report(f"from step {middle}", rest)
        assert rest["hashes"] == whole["hashes"][middle:], "the same rows in the same steps after the resume"
    print(f"every sample in one row, every row on one rank, the same rows after the resume; rows {fill:.2%} full")
    for found in (whole, rest):
        del found["hashes"], found["cursors"]
    sizes = {"samples": len(data.tokens), "files_mib": size, "fill": float(fill)}
    print(json.dumps(facts | sizes | {"whole": whole, "resumed": rest}))


if __name__ == "__main__":
    main()
