"""Memory of a rank between pixels and gradients of a full row, as a config's engine runs it; told without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from eagle_train.model.memory import activation_bytes, meta_row
from eagle_train.train.config import constructor
from eagle_train.train.engine import spare_activations
from eagle_train.train.sequence.group import SequenceGroup
from eagle_train.train.sequence.spread import share_rows
from eagle_train.types import PackedBatch, RowPart

VISUAL, TARGETS = 0.75, 0.25
"""Shares of a row's positions that are visual tokens, and that have a loss; of rows of images and videos about so."""


def weight_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Returns the dtype of weights: the plain engine's are float32, ZeRO's bfloat16 unless it says no."""
    plain = constructor(config["engine"]).__name__ == "PlainEngine"
    return torch.float32 if plain or config["engine"]["bf16"] is False else torch.bfloat16


def row_bytes(
    config: Mapping[str, Any], model: nn.Module, length: int, *, visual: float = VISUAL, targets: float = TARGETS
) -> int:
    """Returns the bytes that the activations of one full row take at their peak, on each rank that shares it.

    The row is one sample, for which attention and thus what is kept of it are the same as for many.

    Args:
        model: on the meta device, with what is trained and what is frozen; it is left as it is.
        length: T.
        visual: share of visual tokens.
        targets: share of positions with loss.
    """
    engine = config["engine"]
    model = copy.deepcopy(model).train().to(weight_dtype(config))
    spare_activations(model, engine["activation_checkpointing"], engine["activation_offload"], engine["mlp_tile"])
    size = engine["sequence_parallel"]
    tokens_per_tile = model.mixture.tokens_per_tile
    num_tiles = int(visual * length) // tokens_per_tile
    tile_size = config["data"]["tile_size"]
    num_targets = max(1, int(targets * length / size))
    if size == 1:
        row = meta_row(
            length,
            num_tiles=num_tiles,
            num_targets=num_targets,
            tokens_per_tile=tokens_per_tile,
            tile_size=tile_size,
            example=model.mixture.example,
        )
    else:
        share_rows(model, SequenceGroup(index=0, size=size, processes=None))
        row = meta_part(length, num_tiles, num_targets, tokens_per_tile=tokens_per_tile, tile_size=tile_size, size=size)
    return activation_bytes(model, row)


def meta_part(
    length: int, num_tiles: int, num_targets: int, *, tokens_per_tile: int, tile_size: int, size: int
) -> PackedBatch:
    """Returns the largest part of a row that `size` ranks share, on the meta device; see `meta_row`.

    Visual tokens stand evenly in it, and `num_targets` labels.
    """
    tokens, tiles = -(-length // size), -(-num_tiles // size)
    num_visual = tiles * tokens_per_tile
    evenly = [num_visual * rank for rank in range(size + 1)]
    room = max(tokens, num_visual)  # of ceilings, so that the tiles fit into the part
    part = meta_row(
        room, num_tiles=tiles, num_targets=num_targets, tokens_per_tile=tokens_per_tile, tile_size=tile_size
    )
    total = room * size
    return replace(
        part,
        cu_seqlens=torch.tensor([0, total], dtype=torch.int32),
        segment_lengths=(total,),
        max_seqlen=total,
        part=RowPart(index=0, begin=0, made=tuple(evenly), placed=tuple(evenly)),
    )
