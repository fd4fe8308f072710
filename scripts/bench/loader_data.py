"""The data of the loader benchmark: photos with conversations as tar shards, and the same in each peer's form."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eagle_train.data.shards import write_shards
from eagle_train.data.toy.tokenizer import END_TOKEN, PAD_TOKEN, train_tokenizer

PHOTO = (640, 480)
"""Width and height of a generated photo, pixels."""
QUALITY = 90
SYLLABLES = ("ba", "cor", "den", "el", "fi", "gra", "hu", "in", "jo", "ka", "lum", "mer", "no", "os", "pri", "ta")
"""Of the words of generated conversations."""

Sample = tuple[str, Mapping[str, Any], Mapping[str, bytes]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Paths:
    """Where the data is."""

    root: Path

    @property
    def shards(self) -> Path:
        """Tars in WebDataset form, with energon's `.nv-meta` and our indexes beside them."""
        return self.root / "shards"

    @property
    def mds(self) -> Path:
        """The same samples for mosaicml-streaming."""
        return self.root / "mds"

    @property
    def tokenizer(self) -> Path:
        """A tokenizer trained on the conversations."""
        return self.root / "tokenizer"

    def tars(self) -> list[Path]:
        """Returns the shards in order."""
        return sorted(self.shards.glob("*.tar"))


def prepare(
    root: Path, *, num_samples: int, per_shard: int, photos: Path | None, seed: int, progress: Progress
) -> Paths:
    """Returns the data under `root`, made unless it is there from an earlier run with the same settings.

    Args:
        photos: folder of JPEGs to take in turn instead of generated ones.
    """
    paths = Paths(root)
    settings = {
        "samples": num_samples,
        "per_shard": per_shard,
        "photos": photos and str(photos.resolve()),
        "seed": seed,
    }
    stamp = root / "settings.json"
    if stamp.exists() and json.loads(stamp.read_text()) != settings:
        raise ValueError(f"{root} holds {stamp.read_text()}, asked for is {json.dumps(settings)}; give another --data")
    if not stamp.exists():
        progress(f"writing {num_samples} samples under {root}")
        images = read_photos(photos) if photos else draw_photos(np.random.default_rng(seed))
        write_shards(make_samples(images, num_samples, seed, progress), paths.shards, samples_per_shard=per_shard)
        texts = [part["text"] for m in records(paths) for part in m["content"] if part["type"] == "text"]
        train_tokenizer(texts, paths.tokenizer, vocab_size=4096, special_tokens=[PAD_TOKEN, END_TOKEN])
        stamp.write_text(json.dumps(settings))
    progress("building what the peers need")
    if importlib.util.find_spec("streaming") and not (paths.mds / "index.json").exists():
        write_mds(paths)
    if importlib.util.find_spec("megatron") and not (paths.shards / ".nv-meta" / "dataset.yaml").exists():
        prepare_energon(paths.shards)
    return paths


def make_samples(images: Iterator[bytes], count: int, seed: int, progress: Progress) -> Iterator[Sample]:
    """Yields `count` samples of one photo and a conversation each."""
    rng = np.random.default_rng([seed, 1])
    words = ["".join(rng.choice(SYLLABLES, size=rng.integers(1, 4))) for _ in range(2000)]
    for number in range(count):
        if number % 500 == 499:
            progress(f"{number + 1} of {count} samples")
        record = {
            "messages": conversation(rng, words),
            "media": [{"kind": "image", "member": "jpg"}],
            "meta": {"number": number},
        }
        yield f"{number:08d}", record, {"jpg": next(images)}


def conversation(rng: np.random.Generator, words: list[str]) -> list[dict[str, Any]]:
    """Returns 1 to 5 questions with answers of 5 to 90 words, about as long as those of LLaVA's mix of 665K."""

    def sentence(low: int, high: int) -> dict[str, str]:
        return {"type": "text", "text": " ".join(rng.choice(words, size=rng.integers(low, high))) + "."}

    messages = []
    for turn in range(rng.integers(1, 6)):
        question = [sentence(5, 25)]
        messages.append({"role": "user", "content": question if turn else [{"type": "media", "index": 0}, *question]})
        messages.append({"role": "assistant", "content": [sentence(5, 90)]})
    return messages


def draw_photos(rng: np.random.Generator) -> Iterator[bytes]:
    """Yields JPEGs that cost as much to decode as photos, and are about as large: windows of a few large pictures.

    A picture is noise at several scales, from slow gradients to grain, so it has detail at all frequencies.
    """
    width, height = PHOTO
    canvases = [draw_canvas(rng, 3 * width, 3 * height) for _ in range(4)]
    while True:
        canvas = canvases[rng.integers(len(canvases))]
        left, top = rng.integers(canvas.width - width), rng.integers(canvas.height - height)
        window = canvas.crop((left, top, left + width, top + height))
        buffer = io.BytesIO()
        window.save(buffer, "JPEG", quality=QUALITY)
        yield buffer.getvalue()


def draw_canvas(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Returns a picture of coloured noise at four scales, with grain."""
    picture = np.full((height, width, 3), 128, np.float32)
    for cell, amplitude in ((160, 45), (40, 22), (10, 12), (4, 7)):  # pixels, levels
        grid = rng.standard_normal((3, height // cell, width // cell)).astype(np.float32) * amplitude
        planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in grid]
        picture += np.stack([np.asarray(plane) for plane in planes], axis=-1)
    picture += rng.standard_normal((height, width, 1)).astype(np.float32) * 6
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def read_photos(folder: Path) -> Iterator[bytes]:
    """Yields the JPEGs of a folder again and again.

    Raises:
        ValueError: if it has none.
    """
    photos = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    if not photos:
        raise ValueError(f"no .jpg or .jpeg under {folder}")
    while True:
        yield from photos


def members(paths: Paths) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields key and contents by extension of every sample."""
    for path in paths.tars():
        with tarfile.open(path) as tar:
            for key, files in groupby(tar, key=lambda info: info.name.partition(".")[0]):
                yield key, {file.name.partition(".")[2]: tar.extractfile(file).read() for file in files}


def records(paths: Paths) -> Iterator[dict[str, Any]]:
    """Yields the messages of all conversations."""
    for _, contents in members(paths):
        yield from json.loads(contents["json"])["messages"]


def write_mds(paths: Paths) -> None:
    """Converts the shards for mosaicml-streaming, uncompressed, as they are here."""
    from streaming import MDSWriter

    with MDSWriter(out=str(paths.mds), columns={"key": "str", "jpg": "bytes", "json": "bytes"}) as writer:
        for key, contents in members(paths):
            writer.write({"key": key, **contents})


def prepare_energon(shards: Path) -> None:
    """Runs energon's own preparation: `.nv-meta` with its index, all samples in the training split."""
    tool = [sys.executable, "-c", "from megatron.energon.cli.main import main; main()", "prepare", str(shards)]
    choices = ["--non-interactive", "--force-overwrite", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run([*tool, *choices, "--num-workers", "1", "--no-progress"], check=True, capture_output=True)
