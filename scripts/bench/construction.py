"""Host memory of a model's start under ZeRO-3, against that of the whole model: it is never whole on a rank.

    python scripts/bench/construction.py
    python scripts/bench/construction.py --ranks 4 --layers 16 --hidden 2048

Every rank builds the model, once from random weights and once from a safetensors file, puts it into shards tensor by
tensor, trains one stage of it, closes the engine and begins the next. Measured is what the process holds of memory of
its own (RssAnon; pages of a mapped file can be dropped at any time) beyond what it held before, at every tensor. On a
CPU with float32 weights: a rank's shards are 1 / ranks of the model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from machine import circumstances, forget_peak, memory_mib
from safetensors.torch import save_file
from torch import nn

from eagle_train import dist
from eagle_train.model.checkpoints.files import read_weights
from eagle_train.model.llm import build_llm
from eagle_train.train.load import load_weights
from eagle_train.train.optim import freeze
from eagle_train.train.placement import Construction, Placement
from eagle_train.train.schedule import Stage
from eagle_train.train.zero.engine import ZeroEngine
from eagle_train.train.zero.join import import_deepspeed

MIB = 2**20
MODEL, FOUND = "model.safetensors", "found.json"


class Metered:
    """A placement that notes, at every tensor, what this process holds.

    Args:
        placement: does the work.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.counts = placement.counts
        self.peak = 0.0

    def put(self, parameter: nn.Parameter, value: torch.Tensor | None) -> None:
        """Puts a parameter in its place, see `Placement`."""
        self.note()
        self.placement.put(parameter, value)
        self.note()

    def put_rest(self, model: nn.Module) -> None:
        """See `Placement`."""
        self.placement.put_rest(model)

    def note(self) -> None:
        """Keeps the largest size so far."""
        self.peak = max(self.peak, memory_mib("RssAnon"))


def make_model(args: argparse.Namespace) -> nn.Module:
    """Returns a Llama, on the CPU."""
    return build_llm(
        model_type="llama",
        vocab_size=2048,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Measures on this rank; rank 0 writes into the folder what all found, in MiB."""
    dist.init()
    fields = {"zero_stage": 3, "bf16": False, "persistence_threshold": 0, "reduce_bucket_size": 10_000_000}
    small = argparse.Namespace(layers=1, hidden=64)
    Construction(partial(make_model, small), ZeroEngine.weights(**fields)).finish()  # imports libraries, joins ranks
    found = {}
    for name in ("file", "random"):
        forget_peak()  # what the construction before has freed is not there to be used again
        before = memory_mib("RssAnon")
        placement = ZeroEngine.weights(**fields)
        metered = Metered(placement)
        construction = Construction(partial(make_model, args), metered)
        if name == "file":
            load_weights(construction.model, read_weights(folder / MODEL), put=construction.put)
        model = construction.finish()
        found[f"{name}: peak of construction"] = metered.peak - before
        found[f"{name}: shards"] = memory_mib("RssAnon") - before
        if name == "random":
            found["peak of two stages"] = peak_of_two_stages(model, placement, fields)
        del model, construction, placement, metered
        gc.collect()
    gathered = dist.gather_objects(found)
    if dist.rank() == 0:
        (folder / FOUND).write_text(json.dumps({name: max(one[name] for one in gathered) for name in found}))
    dist.shutdown()


def peak_of_two_stages(model: nn.Module, placement: Placement, fields: dict) -> float:
    """Returns what going from stage to stage takes beyond the shards, in MiB; next to nothing is trained."""
    rates = {"model": None, "model.norm": 1e-4, "lm_head": None}
    stage = Stage(recipe="x", learning_rates=rates, max_length=8, rows_per_step=1, num_steps=1)
    freeze(model, rates)
    forget_peak()
    before = memory_mib("VmRSS")
    for _ in range(2):
        ZeroEngine(model, stage, 1, placement=placement, **fields).close()
    return memory_mib("VmHWM") - before


def run_rank(rank: int, args: argparse.Namespace, port: int, folder: Path) -> None:
    """Is what the process of a rank does."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": args.ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    measure(args, folder)


def write_model(args: argparse.Namespace, folder: Path) -> None:
    """Writes the weights of a model; in a process of its own, so that no rank inherits its memory."""
    weights = {name: weight.contiguous() for name, weight in make_model(args).state_dict().items()}
    save_file(weights, folder / MODEL)


def run_all(jobs: Iterable[tuple]) -> None:
    """Runs functions with their arguments at once, each in a fork: the libraries are imported once."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=function, args=arguments) for function, *arguments in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a process failed")


def main() -> None:
    """Starts the ranks, prints a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    args = parser.parse_args()
    facts = circumstances()
    import_deepspeed()
    with torch.device("meta"):
        whole = sum(parameter.nbytes for parameter in make_model(args).parameters()) / MIB
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with TemporaryDirectory() as folder:
        run_all([(write_model, args, Path(folder))])
        run_all([(run_rank, rank, args, port, Path(folder)) for rank in range(args.ranks)])
        found = json.loads(Path(folder, FOUND).read_text())
    found = {"whole model": whole} | found
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    for name, size in found.items():
        print(f"{name:<32} {size:8.0f} MiB  {size / whole:6.2f} of the model")
    print(json.dumps(facts | {"mib": found}))


if __name__ == "__main__":
    main()
