"""Floating-point operations of a forward pass, 2 per multiply-add, counted on the meta device."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from eagle_train.model.vlm import VisionLanguageModel


def vision_flops(model: VisionLanguageModel, tile_size: int) -> int:
    """Returns the FLOPs of encoders and projector for one tile.

    Args:
        model: on the meta device.
        tile_size: S in pixels.
    """
    pixels = torch.zeros(1, 3, tile_size, tile_size, dtype=torch.uint8, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.projector(model.mixture(pixels))
    return counter.get_total_flops()


def llm_flops(llm: PreTrainedModel, length: int) -> int:
    """Returns the FLOPs of the LLM and its head for one row of `length` tokens of a single sample.

    Packed rows of shorter samples cost less in attention. A causal kernel's attention is counted in full,
    as if it were not causal.

    Args:
        llm: on the meta device.
    """
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    # A ready 4-D mask: making one would look at values, which meta tensors do not have.
    mask = torch.zeros(1, 1, length, length, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        llm(input_ids=ids, attention_mask=mask, use_cache=False)
    return counter.get_total_flops()
