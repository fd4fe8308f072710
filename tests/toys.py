"""Tiny models and rows for tests; everything from a seed."""

from __future__ import annotations

from dataclasses import replace

import torch

from eagle_train.data.collate import pack
from eagle_train.model.encoders.clip_vit import ClipVit
from eagle_train.model.encoders.convnext import ConvNext
from eagle_train.model.llm import build_llm
from eagle_train.model.loss import ChunkedCrossEntropy
from eagle_train.model.mixtures.channel_concat import ChannelConcat
from eagle_train.model.projector import MlpProjector
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.types import IGNORE_INDEX, EncodedSample, PackedBatch, SampleUse

TILE = 32
GRID = 2
TOKENS_PER_TILE = GRID * GRID
VOCAB = 64


def tiny_model(seed: int = 0, **llm) -> VisionLanguageModel:
    """Returns a model of a few thousand parameters with two encoders of different kind and resolution.

    Args:
        llm: fields of its LLM that are to be others.
    """
    torch.manual_seed(seed)
    vit = ClipVit(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    convnext = ConvNext(name="convnext_atto", image_size=32, depths=[1, 1, 1, 1], dims=[8, 16, 16, 16], stage=1)
    mixture = ChannelConcat(encoders={"vit": vit, "convnext": convnext}, grid=GRID, layer_norm=True)
    fields = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    } | llm
    projector = MlpProjector(mixture.channels, fields["hidden_size"])
    return VisionLanguageModel(
        mixture=mixture, projector=projector, llm=build_llm(**fields), loss=ChunkedCrossEntropy(7)
    )


def tiny_sample(seed: int, *, tiles: int, text: int = 12, source: str = "s") -> EncodedSample:
    """Returns a sample of `tiles` tiles in front of `text` tokens, a third of which are supervised."""
    generator = torch.Generator().manual_seed(seed)
    length = tiles * TOKENS_PER_TILE + text
    ids = torch.randint(1, VOCAB, (length,), generator=generator)
    supervised = torch.zeros(length, dtype=torch.bool)
    supervised[-text // 3 - 1 : -1] = True
    labels = torch.where(supervised, ids.roll(-1), IGNORE_INDEX)
    return EncodedSample(
        key=f"{source}/{seed}",
        source=source,
        input_ids=ids,
        labels=labels,
        loss_weights=supervised.float() * (1 + seed % 3),
        image_positions=torch.arange(tiles * TOKENS_PER_TILE) + 2,
        pixels=torch.randint(0, 256, (tiles, 3, TILE, TILE), generator=generator, dtype=torch.uint8),
    )


def tiny_row(samples: list[EncodedSample], number: int = 0) -> PackedBatch:
    """Returns the samples as one row."""
    return booked(pack(samples, [], filler_id=0, tile_size=TILE), number)


def booked(row: PackedBatch, number: int = 0) -> PackedBatch:
    """Returns a row as the loader makes it: with its number, and what became of its samples, bad ones last."""
    lengths = row.cu_seqlens.diff().tolist()
    used = [
        SampleUse(shard=0, index=i, num_tokens=lengths[i], num_targets=1, num_tiles=0, num_frames=0)
        for i in range(len(row.keys))
    ]
    bad = [
        SampleUse(shard=0, index=i, num_tokens=0, num_targets=0, num_tiles=0, num_frames=0, error=error)
        for i, (_, error) in enumerate(row.errors, start=len(used))
    ]
    return replace(row, row=number, uses=(*used, *bad))


def weighted_loss(model: VisionLanguageModel, rows: list[PackedBatch]) -> torch.Tensor:
    """Returns the globally normalized weighted loss of rows."""
    total = sum((model(row) * row.loss_weights).sum() for row in rows)
    return total / sum(row.loss_weights.sum() for row in rows)


def gradients(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Returns the gradients by name, and clears them."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found


def grown(sample: EncodedSample, **changes) -> EncodedSample:
    """Returns a changed sample."""
    return replace(sample, **changes)
