"""Attention of packed rows by torch's own kernel for them: FlashAttention 2 or cuDNN, nothing to install."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch.nn.attention.varlen import varlen_attn

from eagle_train.model.attention.backend import Segments, repeat_heads
from eagle_train.model.attention.limits import KernelLimits, cast


class VarlenAttention:
    """Calls `torch.nn.attention.varlen.varlen_attn`, once for all samples of a row.

    Torch takes cuDNN where the GPU and the versions allow (2.15 on Hopper and Blackwell), else FlashAttention 2.
    Where the kernel cannot be told that heads share keys and values (2.11), these are repeated.

    Args:
        kernel: of `varlen_attn`'s signature.
        limits: of the kernel.
    """

    def __init__(self, kernel: Callable[..., torch.Tensor] = varlen_attn, limits: KernelLimits | None = None) -> None:
        self.kernel = kernel
        self.limits = limits or KernelLimits()
        self.shares_heads = "enable_gqa" in inspect.signature(kernel).parameters

    def __str__(self) -> str:
        return "varlen"

    def refusal(self, query: torch.Tensor) -> str | None:
        """Returns why queries (T, heads, head_dim) cannot be computed, None where they can."""
        return self.limits.refusal(query)

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
        if reason := self.refusal(query):
            raise ValueError(f"attention=varlen cannot run: {reason}; set attention=auto or attention=segments")
        query, key, value = cast(query, key, value)
        heads = query.shape[1]
        if self.shares_heads:
            sharing = {"enable_gqa": key.shape[1] != heads}
        else:
            sharing, key, value = {}, repeat_heads(key, heads), repeat_heads(value, heads)
        # cuDNN asks for one and the same tensor of lengths, and torch compares the window as a tuple.
        ends, longest = segments.cu_seqlens, segments.max_length
        window = (-1, 0) if causal else (-1, -1)
        return self.kernel(query, key, value, ends, ends, longest, longest, scale=scale, window_size=window, **sharing)
