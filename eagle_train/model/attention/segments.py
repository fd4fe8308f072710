"""Attention segment by segment with torch's own kernels: runs everywhere, and is what the others are compared with."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from eagle_train.model.attention.backend import Segments, repeat_heads


class SegmentAttention:
    """Calls `scaled_dot_product_attention` once per sample, or once for a row of samples of equal length."""

    def __str__(self) -> str:
        return "segments"

    def refusal(self, query: torch.Tensor) -> str | None:
        """Returns None: it runs everywhere."""
        return None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        *,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        """Returns attention within each segment, (T, heads, head_dim); see `AttentionBackend`."""
        # Shared heads cost nothing on a CPU; on a GPU some kernels do not know them, and torch would make (T, T).
        shared = query.device.type != "cuda"
        tensors = [query, key, value] if shared else [query, *(repeat_heads(t, query.shape[1]) for t in (key, value))]
        if len(set(segments.lengths)) == 1:
            batches = [[t.unflatten(0, (len(segments.lengths), -1)) for t in tensors]]
        else:
            pieces = [t.split(segments.lengths) for t in tensors]
            batches = [[piece[None] for piece in sample] for sample in zip(*pieces, strict=True)]
        outputs = [
            F.scaled_dot_product_attention(
                *(tensor.transpose(1, 2) for tensor in batch), is_causal=causal, scale=scale, enable_gqa=shared
            )
            for batch in batches
        ]
        return torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])
