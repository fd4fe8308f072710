"""Samples per second of our loader and of its peers on the same JPEG shards, beside the bare work.

    python scripts/bench/loader.py                                  # generated photos, two workers
    python scripts/bench/loader.py --photos FOLDER --tile 336 --tokens-per-tile 144 --workers 8
    pip install webdataset megatron-energon mosaicml-streaming      # peers; those not installed are left out

Every loader reads samples of the same shards (mosaicml-streaming: the same samples in its own format), decodes the JPEG
with Pillow, pads it to a square and resizes it, and tokenizes the conversation, all by the same functions; ours takes
the tokens from its index, which is made before. Each gives batches of about as many samples, laid end to end: a row of
ours, for the peers as many samples as our rows hold on average. All have the same number of workers of one thread and
prefetch alike. Energon and webdataset shuffle in a buffer and read shards in sequence, mosaicml-streaming shuffles
blocks, ours a whole window.

`bare` is as many processes that decode, resize and tokenize bytes they hold in memory, and nothing else. Loaders take
turns, and the order is reversed from one round to the next; ratios are taken within a round, and their median counts.
`blank` is a second pass in which nothing is decoded: what is left is the loader's own cost per sample, and
tokenizing for all but ours, of which `bare` has the time. CPU time is that of all processes together; it suffers less
than the clock from others on the machine.

At last a toy GPU consumes ours: its steps take as long as a GPU would that needs a share of the loader's rate, and
the time each step waits for its data is noted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from encoders import circumstances
from loader_data import Paths, prepare
from loader_measure import BAR, Rate, Wait, apart, measure, simulate
from loader_ours import ours
from loader_peers import LOADERS, PACKAGES, bare, versions
from loader_work import Task, make_encoder

Results = dict[str, list[Rate]]


def progress(text: str) -> None:
    """Prints what goes on, aside from the results."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def mean_row(task: Task) -> int:
    """Returns the rounded mean number of samples of our rows; builds the index if there is none yet."""
    counts = apart(lambda: list(islice(ours(replace(task, workers=0)), 20)))
    return round(statistics.mean(counts))


def simulate_ours(task: Task, rows_per_step: int, *settings: Any) -> Wait:
    """Returns how long the steps of a toy GPU wait for ours, see `simulate`."""
    return simulate(ours(task, rows_per_step), *settings)


def run_bare(task: Task, warm_up: float, seconds: float) -> Rate:
    """Returns the rate of the bare work."""
    samples, cpu = bare(task, warm_up, seconds)
    return Rate(samples / seconds, cpu / samples)


def repetition(name: str, task: Task, warm_up: float, seconds: float) -> Rate:
    """Returns one repetition of a loader, or of the bare work."""
    if name == "bare":
        return apart(run_bare, task, warm_up, seconds)
    loader: Callable[[Task], Iterator[int]] = ours if name == "ours" else LOADERS[name]
    return apart(lambda: measure(loader(task), warm_up, seconds))


def compare(names: list[str], task: Task, args: argparse.Namespace, what: str) -> Results:
    """Returns the repetitions of all loaders."""
    found: Results = {name: [] for name in names}
    for round_ in range(args.repeat):
        for name in reversed(names) if round_ % 2 else names:
            rate = repetition(name, task, args.warm_up, args.seconds)
            found[name].append(rate)
            progress(f"{what} {round_ + 1}/{args.repeat} {name}: {rate.samples_per_second:.0f} samples/s")
    return found


def ratios(over: list[Rate], under: list[Rate], field: str) -> float:
    """Returns the median over the rounds of `over` divided by `under`: neighbours in time share the machine's mood."""
    return statistics.median(getattr(a, field) / getattr(b, field) for a, b in zip(over, under, strict=True))


def summary(decoded: Results, blank: Results) -> dict[str, dict[str, float]]:
    """Returns the figures of each loader, and ours over it, medians of the rounds."""
    table = {}
    for name in decoded:
        rates, blanks = decoded[name], blank[name]
        table[name] = {
            "samples_per_second": statistics.median(rate.samples_per_second for rate in rates),
            "of_bare": ratios(rates, decoded["bare"], "samples_per_second"),
            "ours_over_it": ratios(decoded["ours"], rates, "samples_per_second"),
            "cpu_ms": statistics.median(rate.cpu_seconds for rate in rates) * 1e3,
            "bare_cpu_over_it": ratios(decoded["bare"], rates, "cpu_seconds"),
            "its_cpu_over_ours": ratios(rates, decoded["ours"], "cpu_seconds"),
            "blank_samples_per_second": statistics.median(rate.samples_per_second for rate in blanks),
            "blank_cpu_us": statistics.median(rate.cpu_seconds for rate in blanks) * 1e6,
            "blank_ours_over_it": ratios(blank["ours"], blanks, "samples_per_second"),
            "blank_its_cpu_over_ours": ratios(blanks, blank["ours"], "cpu_seconds"),
        }
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    """Prints the figures, a loader per line."""
    print(f"{'':<11}|{'with decoding':^72}|{'blank: nothing decoded':^48}")
    heads = ["samples/s", "of bare", "ours/it", "cpu ms", "bare/it cpu", "it/ours cpu"]
    print(f"{'loader':<11}|{cells(heads)}|{cells(['samples/s', 'ours/it', 'cpu us', 'it/ours cpu'])}")
    for name, f in table.items():
        left = [
            f"{f['samples_per_second']:.1f}",
            f"{f['of_bare']:.1%}",
            f"{f['ours_over_it']:.2f}x",
            f"{f['cpu_ms']:.2f}",
            f"{f['bare_cpu_over_it']:.1%}",
            f"{f['its_cpu_over_ours']:.2f}x",
        ]
        right = [
            f"{f['blank_samples_per_second']:.0f}",
            f"{f['blank_ours_over_it']:.2f}x",
            f"{f['blank_cpu_us']:.0f}",
            f"{f['blank_its_cpu_over_ours']:.2f}x",
        ]
        print(f"{name:<11}|{cells(left)}|{cells(right)}")


def cells(texts: list[str]) -> str:
    """Returns texts set flush right."""
    return "".join(f"{text:>12}" for text in texts)


def waits(task: Task, rate: float, args: argparse.Namespace) -> list[Wait]:
    """Returns and prints the waits of the toy GPU at each utilisation."""
    found = []
    for utilisation in args.utilisation:
        progress(f"a toy GPU at {utilisation:.0%} of {rate:.0f} samples/s")
        skip = 2 * task.workers  # steps
        gpu, seconds, rows = utilisation * rate, args.wait_seconds, args.rows_per_step
        # The loader is made in the process that consumes it, and is gone when `simulate` is done.
        wait = apart(partial(simulate_ours, task, rows, gpu, utilisation, seconds, skip))
        found.append(wait)
        print(
            f"wait at {utilisation:.0%} utilisation: mean {wait.mean:.2%}, p99 {wait.p99:.2%}, max {wait.maximum:.2%} "
            f"of {wait.num_steps} steps of {wait.step_seconds:.3f} s; {wait.above_bar} above {BAR:.0%}",
            flush=True,
        )
    return found


def parse() -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/tmp/bench-loader"), help="folder for the data, kept")
    parser.add_argument("--photos", type=Path, help="folder of JPEGs instead of generated ones of 640 x 480")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--tokenizer", help="folder or hub id; default: one trained on the conversations")
    parser.add_argument("--template", default="chatml", help="of configs/chat_template")
    parser.add_argument("--tile", type=int, default=448, help="pixels")
    parser.add_argument("--tokens-per-tile", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=8192, help="tokens of our rows")
    parser.add_argument("--batch", type=int, help="samples of the peers' batches; default: as in our rows on average")
    parser.add_argument("--loaders", nargs="+", choices=sorted(LOADERS), default=list(LOADERS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--prefetch", type=int, default=4, help="batches per worker; ours has its own, 4")
    parser.add_argument("--shuffle", type=int, default=1000, help="samples in the peers' buffers")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a repetition")
    parser.add_argument("--utilisation", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--wait-seconds", type=float, default=30.0)
    parser.add_argument("--rows-per-step", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Prepares the data, compares the loaders, and simulates the toy GPU."""
    args = parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker, for all alike
    present = versions()
    facts = circumstances("cpu")
    facts["versions"] += "".join(f", {PACKAGES[name]} {version}" for name, version in present.items() if version)
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    for name in [name for name in args.loaders if not present[name]]:
        print(f"{name}: left out, not installed; pip install {PACKAGES[name]}")
        args.loaders.remove(name)
    paths = prepare(
        args.data,
        num_samples=args.samples,
        per_shard=args.per_shard,
        photos=args.photos,
        seed=args.seed,
        progress=progress,
    )
    encoder = partial(
        make_encoder,
        args.tokenizer or paths.tokenizer,
        tile_size=args.tile,
        tokens_per_tile=args.tokens_per_tile,
        template=args.template,
    )
    task = Task(
        root=paths.root,
        make_encoder=partial(encoder, blank=False),
        workers=args.workers,
        prefetch=args.prefetch,
        batch=1,
        max_length=args.max_length,
        shuffle=args.shuffle,
        num_samples=100 * args.samples,
        seed=args.seed,
    )
    task = replace(task, batch=args.batch or mean_row(task))
    facts["data"] = describe(paths, args, task)
    print(f"data: {facts['data']}", flush=True)
    names = ["bare", "ours", *args.loaders]
    decoded = compare(names, task, args, "decoding")
    blank = compare(names, replace(task, make_encoder=partial(encoder, blank=True)), args, "blank")
    table = summary(decoded, blank)
    print_table(table)
    found = waits(task, table["ours"]["samples_per_second"], args)
    results: dict[str, Any] = {"loaders": table, "waits": [asdict(wait) for wait in found]}
    results["repetitions"] = {
        what: {name: [asdict(rate) for rate in rates] for name, rates in all_.items()}
        for what, all_ in (("decoding", decoded), ("blank", blank))
    }
    print(json.dumps(facts | results))


def describe(paths: Paths, args: argparse.Namespace, task: Task) -> str:
    """Returns what the data is and how it is laid out."""
    size = sum(tar.stat().st_size for tar in paths.tars()) / args.samples / 1000
    photos = str(args.photos) if args.photos else "generated photos"
    data = f"{args.samples} samples of {photos}, {size:.0f} kB each, {len(paths.tars())} shards"
    tiles = f"tiles of {args.tile} px and {args.tokens_per_tile} tokens"
    return f"{data}; {tiles}, rows of {args.max_length} tokens, batches of {task.batch}, {args.workers} workers"


if __name__ == "__main__":
    main()
