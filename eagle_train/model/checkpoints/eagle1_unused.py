"""Parts of the released Eagle 1 checkpoints that no forward pass uses: not built here, written for the original code.

They take the values that the original code would start them with, or zeros; tables are computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.layers import build_rotary_pos_embed

Tensors = Mapping[str, torch.Tensor]
NUM_CLASSES = 1000
ROTARY_GRID = 16
"""Side of the grid that EVA-02's rotary positions were pretrained on; also of its windows."""
GLOBAL_GRID = 64
HEAD_DIM = 64
GLOBAL_EVERY = 3
"""Of EVA-02's blocks: 2, 5, 8, ... attend globally."""


def nothing(tower: Tensors) -> dict[str, torch.Tensor]:
    """Returns no tensors: of a tower that is used whole."""
    del tower
    return {}


def clip_norm(tower: Tensors) -> dict[str, torch.Tensor]:
    """Returns the norm of CLIP's pooled class token, at its start."""
    width = tower["vision_model.pre_layrnorm.bias"]
    return {
        "vision_model.post_layernorm.weight": torch.ones_like(width),
        "vision_model.post_layernorm.bias": torch.zeros_like(width),
    }


def convnext_head(tower: Tensors) -> dict[str, torch.Tensor]:
    """Returns ConvNeXt's classifier: a norm at its start and 1000 classes of weight zero."""
    channels = [tensor for name, tensor in tower.items() if name.endswith("mlp.fc2.bias")][-1]
    return {
        "head.norm.weight": torch.ones_like(channels),
        "head.norm.bias": torch.zeros_like(channels),
        "head.fc.weight": channels.new_zeros(NUM_CLASSES, len(channels)),
        "head.fc.bias": channels.new_zeros(NUM_CLASSES),
    }


def eva02_tables(tower: Tensors) -> dict[str, torch.Tensor]:
    """Returns EVA-02's rotary tables, (T, 64) cosines and sines, of the tower and again of each block."""
    dtype = tower["pos_embed"].dtype
    tables = {name: rotary_table(side, dtype) for name, side in (("win", ROTARY_GRID), ("glb", GLOBAL_GRID))}
    places = {f"rope_{name}": table for name, table in tables.items()}
    for block in range(sum(name.endswith(".norm1.weight") for name in tower)):
        kind = "glb" if block % GLOBAL_EVERY == GLOBAL_EVERY - 1 else "win"
        places[f"blocks.{block}.attn.rope"] = tables[kind]
    # Copies: a file of weights may not name the same memory twice.
    return {f"{place}.{name}": tensor.clone() for place, table in places.items() for name, tensor in table.items()}


def rotary_table(side: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns cosines and sines (side * side, 64) of a square of tokens that spans 16 steps, computed in float32.

    Source: EVA-02 (arXiv 2303.11331): interleaved pairs, 16 frequencies of base 10000 for rows, then for columns.
    """
    sin, cos = build_rotary_pos_embed(
        [side, side], dim=HEAD_DIM, in_pixels=False, ref_feat_shape=[ROTARY_GRID, ROTARY_GRID]
    )
    return {"freqs_cos": cos.to(dtype), "freqs_sin": sin.to(dtype)}
