"""Real runs at test size: a small toy data set, and runs in this process or in several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

from eagle_train.data.index import ensure_index
from eagle_train.data.ledger import USED
from eagle_train.data.ledger_keys import KeyBook
from eagle_train.data.ledger_read import read_ledger
from eagle_train.data.shards import write_shards
from eagle_train.data.toy.conversations import iter_texts
from eagle_train.data.toy.samples import toy_samples
from eagle_train.data.toy.tokenizer import train_tokenizer
from eagle_train.track.jsonl import read_metrics
from eagle_train.train.config import load_config
from tests.forks import Fork

KINDS = {"shapes": 40, "captions": 24, "video": 6, "multi_image": 8, "text": 12}
SPECIAL = ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
SMALL = (
    "llm.hidden_size=32",
    "llm.intermediate_size=64",
    "llm.num_hidden_layers=2",
    "llm.num_attention_heads=2",
    "mixture.encoders.vit.hidden_size=16",
    "mixture.encoders.vit.intermediate_size=32",
    "mixture.encoders.vit.num_hidden_layers=1",
    "mixture.encoders.vit.num_attention_heads=2",
    "mixture.encoders.convnext.dims=[8,16,16,16]",
    "mixture.encoders.convnext.image_size=64",
    "mixture.grid=4",
    "data.tile_size=64",
    "data.num_workers=0",
    "tracker.wandb=null",
    "evaluation=none",
    "save_every=2",
    "async_save=false",  # so that a run that is killed has published what it saved
    "schedule.pretrain.num_steps=3",
    "schedule.pretrain.max_length=384",
    "schedule.sft.max_length=384",
    "schedule.sft.num_steps=6",
)


def make_data(root: Path) -> Path:
    """Builds a small toy data set under `root`; returns it."""
    records = []
    cards = {}
    for kind, count in [*KINDS.items(), ("all", 24)]:
        split = "heldout" if kind == "all" else "train"
        samples = list(toy_samples(kind, split, count, seed=0))
        records += [record for _, record, _ in samples]
        for shard in write_shards(samples, root / f"small_{kind}", samples_per_shard=10):
            ensure_index(shard)
        cards[f"small_{kind}"] = {
            "description": "",
            "licence": "",
            "origin": "",
            "shards": f"small_{kind}/*.tar",
        }
    train_tokenizer(iter_texts(records), root / "tokenizer", vocab_size=512, special_tokens=SPECIAL)
    sources = {f"small_{kind}": {"repeat": 1.0} for kind in KINDS}
    recipe = {"name": "small", "description": "", "sources": sources, "evaluation": ["small_all"], "datasets": cards}
    (root / "small.yaml").write_text(yaml.safe_dump(recipe))
    return root


def overrides(data: Path, run: Path, *more: str) -> list[str]:
    """Returns the overrides of a small run on `data` into `run`."""
    here = [
        "+experiment=toy",
        f"data_root={data}",
        f"tokenizer={data / 'tokenizer'}",
        f"run_dir={run}",
        f"schedule.pretrain.recipe={data / 'small.yaml'}",
        f"schedule.sft.recipe={data / 'small.yaml'}",
    ]
    return [*here, *SMALL, *more]


def config(data: Path, run: Path, *more: str) -> dict:
    """Returns the config of a small run."""
    return load_config(overrides(data, run, *more))


def environment(**extra: str) -> dict[str, str]:
    """Returns an environment for a subprocess: one thread, so that results do not depend on load."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | extra


def fork(arguments: list[str], program: str = "eagle_train", **extra: str) -> Fork:
    """Starts a module or a script without the seconds that a new interpreter takes to import everything."""
    return Fork(program, arguments, environment(**extra))


def start(arguments: list[str], module: str = "eagle_train", **extra: str) -> subprocess.Popen:
    """Starts `python -m module ...` in a new interpreter."""
    command = [sys.executable, "-m", module, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment(**extra), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def run_script(script: Path, *arguments: str, timeout: float = 240, **extra: str) -> str:
    """Runs a script, demands that it ends well, and returns what it printed."""
    process = fork(list(arguments), str(script), **extra)
    printed, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, printed[-2000:] + errors[-4000:]
    return printed


def run_ranks(
    arguments: list[str], ranks: int = 1, module: str = "eagle_train", timeout: float = 240
) -> list[tuple[int, str]]:
    """Runs `python -m module ...` on `ranks` processes, forked; returns (exit code, output) of each."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    extra = [
        {"RANK": str(r), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(r), "MASTER_PORT": port} for r in range(ranks)
    ]
    processes = [fork(arguments, module, **(one if ranks > 1 else {})) for one in extra]
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(p.returncode, "".join(out)) for p, out in zip(processes, outputs, strict=True)]


def must_run(arguments: list[str], ranks: int = 1, module: str = "eagle_train", timeout: float = 240) -> None:
    """Runs and demands that every rank ends well."""
    for code, output in run_ranks(arguments, ranks, module, timeout):
        assert code == 0, output[-4000:]


def losses(run: Path) -> list[float]:
    """Returns the loss of every global step, checking that each step is there exactly once."""
    records = [r for r in read_metrics(run / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [r["train/loss"] for r in records]


def gradient_norms(run: Path) -> list[float]:
    """Returns the gradient norm of every global step."""
    return [r["train/grad_norm"] for r in read_metrics(run / "metrics.jsonl") if "train/grad_norm" in r]


def rows(run: Path) -> dict[tuple[str, int], list[list[str]]]:
    """Returns the keys of the rows of every step, in a fixed order; empty rows left out."""
    steps: dict[tuple[str, int], dict[int, list[str]]] = {}
    for stage in sorted(path.name for path in (run / "ledger").iterdir()):
        table = read_ledger(run / "ledger", stage)
        book = KeyBook(table.shards)
        for use in table.records[table.records["status"] == USED]:
            of_step = steps.setdefault((stage, int(use["step"])), {})
            of_step.setdefault(int(use["row"]), []).append(book.key(int(use["shard"]), int(use["index"])))
    return {step: sorted(of_step.values()) for step, of_step in steps.items()}


def accounts(run: Path) -> dict:
    """Returns the run's accounting."""
    return json.loads((run / "accounting.json").read_text())
