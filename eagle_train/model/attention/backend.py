"""What every kernel for packed rows is given, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, eq=False)  # compared by identity: a backend may keep what it made of the last one
class Segments:
    """Where the samples of a packed row begin and end; made once per row, used by every layer.

    Args:
        cu_seqlens: (K + 1,) int32 on the device, cumulative lengths: [0, ..., T].
        lengths: the K lengths in tokens, on the host, so that no layer has to wait for the device.
        max_length: the largest of them.
    """

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    max_length: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Segments:
        """Returns the segments of consecutive samples of `lengths` tokens."""
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return cls(ends.to(device, torch.int32, non_blocking=True), tuple(lengths), max(lengths))


class AttentionBackend(Protocol):
    """Exact attention of a packed row, in which every sample sees itself alone."""

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
        """Returns softmax(scale Q K^T) V within each segment, (T, heads, head_dim).

        Args:
            query: (T, heads, head_dim).
            key, value: (T, key-value heads, head_dim); the heads are a multiple of them, and consecutive heads
                share one.
            segments: of the T tokens.
            scale: of the products of queries and keys.
            causal: whether a token sees only itself and those before it in its sample.

        Raises:
            ValueError: where the kernel cannot run, with what can.
        """


def repeat_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns (T, heads, head_dim) of keys or values (T, key-value heads, head_dim), each repeated in its place."""
    groups = heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)
