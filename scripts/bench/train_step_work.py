"""Models with random weights and samples of random tokens and pixels, for train_step.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from lengths import ANSWERS, lengths_of

from eagle_train import dist
from eagle_train.data.collate import pack
from eagle_train.data.packing import pack_rows
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import build_model
from eagle_train.train.config import load_config
from eagle_train.train.engine import PlainEngine
from eagle_train.train.placement import WholeWeights
from eagle_train.train.schedule import Stage
from eagle_train.types import IGNORE_INDEX, EncodedSample, PackedBatch, SampleUse

FULL = ["+experiment=eagle2-1b", "tokenizer=none"]
NARROW = 7
"""How many times narrower the toy's LLM is than Qwen2.5-0.5B; its samples are as many times shorter."""
TOY_LLM = [
    "llm.hidden_size=128",
    "llm.intermediate_size=695",
    "llm.num_attention_heads=2",
    "+llm.num_key_value_heads=1",
    "llm.vocab_size=2816",  # of 3 layers, not 24: the head has the share of a forward pass that it has there
]
SIZES = {
    "toy": ["+experiment=toy", "tokenizer=none", *TOY_LLM],
    "0.5b": [*FULL, "llm=qwen2_5_0_5b"],
    "1.5b": [*FULL, "llm=qwen2_5_1_5b"],
    "7b": [*FULL, "llm=qwen2_5_7b"],
}
"""Overrides by size of the LLM."""
MIXTURES = {
    "siglip": [],  # of eagle2-1b: SigLIP so400m at 448 px, 256 tokens per tile
    "x5": ["mixture=eagle_x5_better", "data.tile_size=1024", "projector=mlp2x_gelu"],  # 1024 tokens per tile
}


LLAVA_BATCH = 16
"""Samples per device and batch in LLaVA's and Eagle's scripts."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A sample to be made."""

    tokens: int
    tiles: int


def make_model(size: str, mixture: str, *more: str) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """Returns a model in training mode on this process's device, float32, all of it trained, and its config."""
    choice = [] if size == "toy" else MIXTURES[mixture]
    config = load_config([*SIZES[size], *choice, *more])
    torch.manual_seed(0)
    with dist.device():  # 7B random weights take minutes on a CPU
        return build_model(config).train(), config


def make_engine(model: VisionLanguageModel, stage: Stage, **options: bool) -> PlainEngine:
    """Returns plain torch around a model: on a GPU weights, gradients and AdamW's states are all bfloat16.

    So a 7B model with its optimizer, 8 bytes a parameter, fits on one card; a real run has float32 masters, sharded.
    """
    device = dist.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return PlainEngine(model, stage, 1, placement=WholeWeights(device, dtype), bf16=False, **options)


def scale_of(size: str) -> int:
    """Returns how many times shorter the samples of a size are."""
    return NARROW if size == "toy" else 1


def longest_of(mix: str, scale: int) -> int:
    """Returns the tokens of the longest samples that are taken of a mix."""
    return {"eagle1_sft": 2048, "eagle1_tiled": 4096}[mix] // scale


def toy_grid(mix: str) -> int:
    """Returns the side of the toy's grid of visual tokens: 1024 or 256 of a tile, so many times fewer."""
    return {"eagle1_sft": 12, "eagle1_tiled": 6}[mix]


def batch_of(shapes: Sequence[Shape], row: int) -> int:
    """Returns the samples of a padded batch: as many as make a row's worth of tokens on average, at most LLaVA's."""
    return min(LLAVA_BATCH, max(1, round(row * len(shapes) / sum(shape.tokens for shape in shapes))))


def shapes_of(mix: str, longest: int, tokens_per_tile: int, count: int, scale: int, seed: int = 0) -> list[Shape]:
    """Returns `count` samples of a mix of lengths.py, in random order, those of at most `longest` tokens.

    Args:
        tokens_per_tile: what a tile has here; the mix's own number is taken off.
        scale: texts are that many times shorter than the mix's.
    """
    per_tile = 1024 if mix == "eagle1_sft" else 256
    data = lengths_of(mix, 32_768, 0.05, seed)
    texts = np.maximum((data.tokens - per_tile * data.tiles) // scale, 8)
    tokens = texts + tokens_per_tile * data.tiles
    order = np.random.default_rng(seed).permutation(np.flatnonzero(tokens <= longest))[:count]
    return [Shape(tokens=int(tokens[i]), tiles=int(data.tiles[i])) for i in order]


def make_samples(shapes: Sequence[Shape], model: VisionLanguageModel, tile_size: int) -> list[EncodedSample]:
    """Returns samples of these shapes: tiles first, then the question, then the answer."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, per_tile = model.llm.config.vocab_size, model.mixture.tokens_per_tile
    samples = []
    for number, shape in enumerate(shapes):
        ids = torch.randint(1, vocabulary, (shape.tokens,), generator=generator)
        answer = max(1, int(ANSWERS * (shape.tokens - per_tile * shape.tiles)))
        labels = ids.roll(-1)
        labels[: shape.tokens - answer - 1] = IGNORE_INDEX
        labels[-1] = IGNORE_INDEX
        size = (shape.tiles, 3, tile_size, tile_size)
        samples.append(
            EncodedSample(
                key=f"synthetic/{number}",
                source="images" if shape.tiles else "texts",
                input_ids=ids,
                labels=labels,
                loss_weights=(labels != IGNORE_INDEX).float(),
                image_positions=torch.arange(per_tile * shape.tiles),
                pixels=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
            )
        )
    return samples


def make_rows(samples: Sequence[EncodedSample], capacity: int, tile_size: int) -> list[PackedBatch]:
    """Returns the samples in packed rows, as the loader gives them."""
    lengths = np.array([len(sample.input_ids) for sample in samples])
    places, offsets = pack_rows(lengths, lengths.astype(float), capacity)
    rows = []
    for number, (first, last) in enumerate(pairwise(offsets)):
        some = [samples[i] for i in places[first:last]]
        uses = [
            SampleUse(
                shard=0,
                index=int(i),
                num_tokens=len(samples[i].input_ids),
                num_targets=int((samples[i].labels != IGNORE_INDEX).sum()),
                num_tiles=len(samples[i].pixels),
                num_frames=0,
            )
            for i in places[first:last]
        ]
        row = pack(some, [], filler_id=0, tile_size=tile_size)
        rows.append(replace(row, row=number, uses=tuple(uses)))
    return rows


def supervised(rows: Sequence[PackedBatch] | Sequence[EncodedSample]) -> int:
    """Returns the positions with a label."""
    return sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows)
