"""Attention of packed rows: every sample attends to itself alone, through transformers' public interface."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "eagle_packed"
"""Name under which `packed_attention` is registered; a config's `_attn_implementation`."""


def packed_arguments(segment_lengths: Sequence[int], device: torch.device) -> dict:
    """Returns the arguments a transformers model needs beside a packed row's embeddings and positions.

    The mask is a stand-in: transformers takes a 4-D mask as ready and builds none of its own, which would be
    dense, (T, T). `packed_attention` refuses it where the segments did not arrive.

    Args:
        segment_lengths: tokens of each sample of the row, in order.
    """
    stand_in = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    return {"attention_mask": stand_in, "segment_lengths": tuple(segment_lengths), "use_cache": False}


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    segment_lengths: Sequence[int] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Returns causal attention (1, T, heads, head_dim), segment by segment; generation goes to SDPA.

    Args:
        query: (1, heads, T, head_dim).
        key, value: (1, key-value heads, T, head_dim).
        attention_mask: of generation; a stand-in for packed rows.
        segment_lengths: tokens of each sample of a packed row; None outside training.

    Raises:
        RuntimeError: if a packed row's segments did not reach this layer, which would let samples leak.
    """
    if segment_lengths is None:
        if attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:
            raise RuntimeError(f"{type(module).__name__} was not given the segments of a packed row")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    pieces = zip(*(t.split(list(segment_lengths), dim=2) for t in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(*piece, is_causal=True, scale=scaling) for piece in pieces]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
