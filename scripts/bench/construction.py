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
import os
import socket
import subprocess
import sys
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

MIB = 2**20


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


def measure(args: argparse.Namespace) -> None:
    """Measures on this rank; rank 0 writes what all found, in MiB."""
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
            load_weights(construction.model, read_weights(Path(args.file)), put=construction.put)
        model = construction.finish()
        found[f"{name}: peak of construction"] = metered.peak - before
        found[f"{name}: shards"] = memory_mib("RssAnon") - before
        if name == "random":
            found["peak of two stages"] = peak_of_two_stages(model, placement, fields)
        del model, construction, placement, metered
        gc.collect()
    gathered = dist.gather_objects(found)
    if dist.rank() == 0:
        Path(args.out).write_text(json.dumps({name: max(one[name] for one in gathered) for name in found}))
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


def start_rank(rank: int, args: argparse.Namespace, port: int, folder: str) -> subprocess.Popen:
    """Starts one rank."""
    command = [sys.executable, __file__, "--layers", str(args.layers), "--hidden", str(args.hidden)]
    files = ["--file", f"{folder}/model.safetensors", "--out", f"{folder}/found.json"]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": args.ranks, "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in place.items()}
    return subprocess.Popen([*command, *files], env=environment)


def main() -> None:
    """Starts the ranks, prints a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        measure(args)
        return
    facts = circumstances()
    with TemporaryDirectory() as folder, socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        model = make_model(args)
        whole = sum(parameter.nbytes for parameter in model.parameters()) / MIB
        save_file(
            {name: weight.contiguous() for name, weight in model.state_dict().items()}, f"{folder}/model.safetensors"
        )
        del model
        port = sock.getsockname()[1]
        sock.close()
        ranks = [start_rank(rank, args, port, folder) for rank in range(args.ranks)]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit("a rank failed")
        found = json.loads(Path(folder, "found.json").read_text())
    found = {"whole model": whole} | found
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    for name, size in found.items():
        print(f"{name:<32} {size:8.0f} MiB  {size / whole:6.2f} of the model")
    print(json.dumps(facts | {"mib": found}))


if __name__ == "__main__":
    main()
