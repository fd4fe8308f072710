"""Seconds of a training step under ZeRO-2 and ZeRO-3 by the sizes of buckets and by overlap, against DeepSpeed's own.

    python scripts/bench/buckets.py --ranks 2                                  # toy size, processes on this CPU
    torchrun --nproc-per-node 8 scripts/bench/buckets.py --size 7b --row 16384 # a node with GPUs; srun does as well

Each case is an engine made anew that takes the same steps on packed rows of the 1.8M mix (train_step_work.py); rows are
split between ranks. Cases take turns, `--repeats` times; a case counts with its fastest step, of the slowest rank, in
wall-clock time: buckets change waiting, not work. `deepspeed` is what DeepSpeed takes where nothing is set (0.19.8:
buckets of 500M elements, 50M prefetched, overlap under stage 3). `ours` is what configs/engine has. The others change
one thing of ours: all buckets (gradients; and weights, after an update under stage 2 or ahead of their use under stage
3), or overlap. On a CPU gloo sends and no stream runs beside another: what overlap gains shows on GPUs alone. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from encoders import circumstances
from train_step_ours import make_stage
from train_step_work import MIXTURES, SIZES, longest_of, make_rows, make_samples, scale_of, shapes_of, toy_grid

from eagle_train import dist
from eagle_train.train.assemble import build_model, meta_model
from eagle_train.train.config import load_config
from eagle_train.train.optim import freeze
from eagle_train.train.placement import Construction
from eagle_train.train.zero.engine import ZeroEngine
from eagle_train.train.zero.join import import_deepspeed
from eagle_train.types import PackedBatch

SECOND = {2: "allgather_bucket_size", 3: "prefetch_bucket_size"}
"""The bucket beside that of gradients."""


def deepspeeds_own(zero_stage: int) -> dict[str, Any]:
    """Returns what DeepSpeed takes where nothing is configured."""
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    own = DeepSpeedZeroConfig(stage=zero_stage)
    return {name: getattr(own, name) for name in ("overlap_comm", "reduce_bucket_size", SECOND[zero_stage])}


def cases_of(zero_stage: int, buckets: list[int]) -> dict[str, dict[str, Any]]:
    """Returns the fields of the engine by the name of a case."""
    cases = {"deepspeed": deepspeeds_own(zero_stage), "ours": {}, "ours, overlap": {"overlap_comm": True}}
    return cases | {f"buckets {size:,}": {"reduce_bucket_size": size, SECOND[zero_stage]: size} for size in buckets}


def engine_fields(zero_stage: int, case: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of configs/engine/zero<stage>.yaml with those of a case in their place."""
    config = load_config(["+experiment=toy", "tokenizer=none", f"engine=zero{zero_stage}"])["engine"]
    return {name: value for name, value in config.items() if not name.startswith("_")} | case


def take_steps(
    config: Mapping[str, Any], fields: Mapping[str, Any], rows: list[PackedBatch], steps: int
) -> list[float]:
    """Returns the seconds of each step of this rank on a model of its own, but for the first, which warms up."""
    torch.manual_seed(0)
    placement = ZeroEngine.weights(**fields)
    model = Construction(partial(build_model, config), placement).finish().train()
    stage = make_stage(steps, len(rows[0].input_ids))
    freeze(model, stage.learning_rates)
    engine = ZeroEngine(model, stage, 1, placement=placement, **fields)
    times = []
    for row in islice(cycle(rows), steps + 1):
        dist.barrier()
        began = time.perf_counter()
        batch = row.to(engine.device)
        loss = (engine.forward(batch) * batch.loss_weights).sum() / batch.loss_weights.sum()
        engine.backward(loss / dist.world_size(), last=True)
        engine.step(1.0)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    engine.close()
    return times[1:]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns seconds per step by stage and case, the same on every rank."""
    choice = [] if args.size == "toy" else MIXTURES["siglip"]
    grid = [f"mixture.grid={toy_grid('eagle1_sft')}"] if args.size == "toy" else []
    config = load_config([*SIZES[args.size], *choice, *grid])
    meta, tile_size = meta_model(config), config["data"]["tile_size"]
    scale, per_tile = scale_of(args.size), meta.mixture.tokens_per_tile
    shapes = shapes_of("eagle1_sft", min(longest_of("eagle1_sft", scale), args.row), per_tile, args.samples, scale)
    rows = make_rows(make_samples(shapes, meta, tile_size), args.row, tile_size)
    if len(rows) < dist.world_size():
        dist.shutdown()
        raise SystemExit(f"{len(rows)} rows for {dist.world_size()} ranks: raise --samples or lower --row")
    rows = rows[: len(rows) // dist.world_size() * dist.world_size()][dist.rank() :: dist.world_size()]
    found: dict[str, dict[str, float]] = {}
    for zero_stage in args.stages:
        cases = cases_of(zero_stage, args.buckets)
        best = dict.fromkeys(cases, float("inf"))
        for _ in range(args.repeats):
            for name, case in cases.items():
                own = take_steps(config, engine_fields(zero_stage, case), rows, args.steps)
                slowest = [max(step) for step in zip(*dist.gather_objects(own), strict=True)]
                best[name] = min(best[name], *slowest)
                gc.collect()
        found[f"zero{zero_stage}"] = best
    own = {f"zero{stage}": deepspeeds_own(stage) for stage in args.stages}
    parameters = sum(parameter.numel() for parameter in meta.parameters())
    return {"parameters": parameters, "ranks": dist.world_size(), "row": args.row, "deepspeed": own, "seconds": found}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yields the table."""
    yield f"{found['parameters']:,} parameters, {found['ranks']} ranks, a row of {found['row']} tokens each and step"
    for stage, seconds in found["seconds"].items():
        for name, each in seconds.items():
            ratio = each / seconds["deepspeed"]
            yield f"{stage}  {name:<22} {each * 1000:9.1f} ms a step   {ratio:5.2f} of DeepSpeed's defaults"


def start_ranks(args: argparse.Namespace) -> int:
    """Measures on so many processes of this machine, forks of this one; returns 1 if one failed."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ranks, context = args.ranks, multiprocessing.get_context("fork")
    places = [{"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": ranks, "MASTER_PORT": port} for r in range(ranks)]
    running = [context.Process(target=be_rank, args=(args, place)) for place in places]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return int(any(process.exitcode for process in running))


def be_rank(args: argparse.Namespace, place: Mapping[str, int]) -> None:
    """Measures as the rank that these variables say."""
    os.environ |= {name: str(value) for name, value in place.items()}
    report(args)


def report(args: argparse.Namespace) -> None:
    """Measures on all ranks; the first prints a table, then JSON."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    dist.init()
    facts = circumstances(dist.device().type)
    if dist.rank() == 0:
        print("\n".join(f"{name}: {fact}" for name, fact in facts.items()), flush=True)
    found = measure(args)
    if dist.rank() == 0:
        print("\n".join(lines(found)))
        print(json.dumps(facts | found), flush=True)
    dist.shutdown()


def main() -> None:
    """Measures on ranks started here, or as the one that a launcher started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="processes to start here; not under torchrun or srun")
    parser.add_argument("--size", choices=list(SIZES), default="toy")
    parser.add_argument("--row", type=int, default=2048, help="tokens of a row, of which each rank has one in a step")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--stages", type=int, nargs="+", choices=[2, 3], default=[2, 3])
    parser.add_argument("--buckets", type=int, nargs="+", help="elements; by size: few thousands, or 50M to 1G")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    toy, full = [10_000, 100_000, 1_000_000], [50_000_000, 200_000_000, 500_000_000, 1_000_000_000]
    args.buckets = args.buckets or (toy if args.size == "toy" else full)
    if args.ranks > 1 and dist.world_size() == 1:
        sys.exit(start_ranks(args))
    report(args)


if __name__ == "__main__":
    main()
