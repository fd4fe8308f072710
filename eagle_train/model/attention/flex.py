"""Attention of packed rows by torch's flex_attention: a kernel that torch compiles for a mask by sample."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from eagle_train.model.attention.backend import Segments
from eagle_train.model.attention.limits import cast

BLOCK = 128
"""Tokens of a block of the mask; flex_attention's own default."""


class FlexAttention:
    """Calls `flex_attention` with a mask that lets every sample see itself alone.

    Blocks of the mask are found from the samples' ends: nothing of T x T elements is made. The mask is made once
    per row and kept for the row's other layers.

    Args:
        compiled: whether the kernel is compiled. Without, torch computes T x T products: for tests.
    """

    def __init__(self, *, compiled: bool = True) -> None:
        self.kernel = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
        self._mask: tuple[Segments, bool, BlockMask] | None = None

    def __str__(self) -> str:
        return "flex"

    def refusal(self, query: torch.Tensor) -> str | None:
        """Returns why queries (T, heads, head_dim) cannot be computed, None where they can."""
        if query.device.type == "cpu" and query.requires_grad and torch.is_grad_enabled():
            return "flex_attention has no backward pass on a CPU"
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
        if reason := self.refusal(query):
            raise ValueError(f"attention=flex cannot run: {reason}; set attention=auto or attention=segments")
        tensors = (tensor.transpose(0, 1)[None] for tensor in cast(query, key, value))
        mask = self.mask(segments, causal)
        found = self.kernel(*tensors, block_mask=mask, scale=scale, enable_gqa=key.shape[1] != query.shape[1])
        return found[0].transpose(0, 1)

    def mask(self, segments: Segments, causal: bool) -> BlockMask:
        """Returns the mask of a row, made anew only where the row is another than the last."""
        if self._mask is None or self._mask[0] is not segments or self._mask[1] != causal:
            self._mask = (segments, causal, block_mask(segments, causal))
        return self._mask[2]


def block_mask(segments: Segments, causal: bool) -> BlockMask:
    """Returns the mask in which every token sees its own sample, causally or whole.

    A block of queries touches the blocks of keys from the first of its first token's sample to its own, or, not
    causally, to the last of its last token's sample. Of these, a block is full, so that the kernel need not look at
    single tokens, where both blocks lie in one sample and, causally, the keys' block is before the queries'.
    """
    ends = segments.cu_seqlens.long()
    length, device = sum(segments.lengths), ends.device
    sample = torch.bucketize(torch.arange(length, device=device), ends[1:], right=True)
    first = torch.arange(0, length, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=length - 1)
    begin = ends[sample[first]] // BLOCK
    end = first // BLOCK if causal else (ends[sample[last] + 1] - 1) // BLOCK
    place = torch.arange(len(first), device=device)
    touched = (begin[:, None] <= place) & (place <= end[:, None])
    whole = sample[first] == sample[last]
    same = (sample[first][:, None] == sample[first]) & whole[:, None] & whole
    full = touched & same & ((place < place[:, None]) if causal else torch.ones_like(touched))
    # The last block may have less than BLOCK tokens; it is left to the mask, which is asked for real tokens only.
    if length % BLOCK:
        full[-1], full[:, -1] = False, False

    def see(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        together = sample[query] == sample[key]
        return together & (query >= key) if causal else together

    partial = touched & ~full
    return BlockMask.from_kv_blocks(
        *counts_and_places(partial), *counts_and_places(full), BLOCK, see, seq_lengths=(length, length)
    )


def counts_and_places(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns flex_attention's form of a map of blocks (Q, K) bool.

    Returns:
        (1, 1, Q) int32: how many of a row are true; (1, 1, Q, K) int32: where, those that are not behind them.
    """
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()
