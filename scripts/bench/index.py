"""Speed of building index and text lengths beside a process that only reads headers, parses JSON and tokenizes.

    python scripts/bench/index.py
    python scripts/bench/index.py --tokenizer FOLDER --template vicuna_v1
    taskset -c 0 python scripts/bench/index.py --samples 2000          # one core, whatever the libraries do

Ours makes everything that planning needs: checked records, header facts of the images, and the tokens and targets up
to every answer under a chat template. The plain reader goes through the tar with `tarfile`, calls `json.loads`, joins
the texts of a conversation and tokenizes them without any template; `batch` hands the tokenizer many conversations at
once, `each` one by one, and `lengths` many at once for ids only, no offsets. They take turns on one thread, and swap
who goes first; medians of processor time are compared. Conversations are made of the English of Python's own manual:
one to four answers, 50 to 600 tokens, one JPEG each, whose bytes all share. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eagle_train.data.chat import ChatTemplate
from eagle_train.data.index import index_shard
from eagle_train.data.lengths import Lengths, TextLayout
from eagle_train.data.shards import write_shards
from eagle_train.data.tokenizer.load import default_cache, load_tokenizer
from eagle_train.train.config import build, load_config

BATCH = 100
"""Conversations that the plain reader tokenizes at once."""


def english() -> list[str]:
    """Returns the words of Python's manual, without its markup."""
    return " ".join(topics.topics.values()).replace("*", "").replace("`", "").replace("=", "").split()


def conversations(count: int, seed: int = 0) -> Iterator[tuple[str, dict[str, Any], dict[str, bytes]]]:
    """Yields samples in LLaVA's form."""
    rng = random.Random(seed)
    words = english()
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)

    def some(number: int) -> str:
        start = rng.randrange(len(words) - number)
        return " ".join(words[start : start + number])

    for sample in range(count):
        num_answers = rng.randint(1, 4)
        per_answer = max(5, round(rng.uniform(50, 600) / 1.45 / num_answers) - 13)  # tokens of a word of this text
        turns = []
        for answer in range(num_answers):
            question = ("" if answer else "<image>\n") + some(rng.randint(8, 18))
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": some(per_answer)}]
        yield f"{sample:08d}", {"id": str(sample), "image": "0.jpg", "conversations": turns}, {"0.jpg": out.getvalue()}


def small_tokenizer(size: int = 8000):
    """Returns a byte-level tokenizer trained on the same manual, with ChatML's tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(topics.topics.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def ours(shards: Sequence[Path], text: TextLayout) -> None:
    """Builds index and text lengths of the shards, without writing them."""
    for shard in shards:
        lengths = Lengths(text)
        index_shard(shard, lengths.add)
        lengths.table()


def plain(shards: Sequence[Path], tokenize: Callable[[Sequence[str]], object]) -> None:
    """Reads headers, parses JSON and tokenizes."""
    for shard in shards:
        texts = []
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.name.endswith(".json"):
                    record = json.loads(tar.extractfile(info).read())
                    texts.append("\n".join(turn["value"] for turn in record["conversations"]))
        for start in range(0, len(texts), BATCH):
            tokenize(texts[start : start + BATCH])


def compare(shards: Sequence[Path], text: TextLayout, iterations: int) -> dict[str, list[float]]:
    """Returns the processor seconds of every run, by who ran."""
    backend = text.tokenizer.backend_tokenizer
    encode, batch, fast = (
        partial(function, add_special_tokens=False)
        for function in (backend.encode, backend.encode_batch, backend.encode_batch_fast)
    )
    runs = {
        "ours": partial(ours, shards, text),
        "batch": partial(plain, shards, batch),
        "each": partial(plain, shards, lambda texts: [encode(text) for text in texts]),
        "lengths": partial(plain, shards, fast),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.freeze()  # as our processes do; for all alike
    for turn in range(iterations + 1):
        for name in reversed(runs) if turn % 2 else runs:
            start = time.process_time()
            runs[name]()
            if turn:  # the first pass warms up
                seconds[name].append(time.process_time() - start)
    return seconds


def circumstances() -> dict[str, str]:
    """Returns hardware, command and commit."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = partial(subprocess.run, capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--", "../../eagle_train"]).stdout.strip()
    return {
        "hardware": f"{names[0] if names else platform.machine()}, one of {os.cpu_count()} CPU threads",
        "command": "python " + " ".join(sys.argv),
        "commit": commit + (" with changes" if changed else ""),
        "versions": f"Python {platform.python_version()}, tokenizers {tokenizers.__version__}",
    }


def main() -> None:
    """Makes the shards, compares, and prints a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder or hub id; without it, one of 8000 tokens is trained")
    parser.add_argument("--template", default="chatml", help="a config of the group chat_template")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=7)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    facts = circumstances()
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    tokenizer = load_tokenizer(args.tokenizer, default_cache()) if args.tokenizer else small_tokenizer()
    template: ChatTemplate = build(load_config(["+experiment=toy", f"chat_template={args.template}"])["chat_template"])
    text = TextLayout(template=template, tokenizer=tokenizer, fingerprint="bench")
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(
            conversations(args.samples), Path(folder) / "bench", samples_per_shard=args.samples_per_shard
        )
        lengths = Lengths(text)
        for shard in shards:
            index_shard(shard, lengths.add)
        lengths.table()
        tokens = [text.ends[-1].num_tokens for text in lengths.rows]
        print(f"tokens of a conversation: {min(tokens)} to {max(tokens)}, {statistics.mean(tokens):.0f} on average")
        seconds = compare(shards, text, args.iterations)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        rate = f"{args.samples / median:8.0f} samples/s"
        print(f"{name:<8} {median:.3f} s ({spread}) {rate}, ours has {median / medians['ours']:.2f} of its speed")
    ratios = {name: median / medians["ours"] for name, median in medians.items() if name != "ours"}
    print(json.dumps(facts | {"seconds": medians, "speed_of_ours": ratios}))


if __name__ == "__main__":
    main()
