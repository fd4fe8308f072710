"""Floating-point operations of training on a row: forward and backward, by what is frozen and what is recomputed.

Nothing is derived on paper: the stage's own model, with its own frozen parameters, runs forward and backward on the
meta device over four small rows, which tell tokens, attention, tiles and targets apart.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from eagle_train.model.flop_counter import FlopCounter
from eagle_train.model.loss import ChunkedCrossEntropy, LigerCrossEntropy
from eagle_train.model.memory import GpuKernels, forget_gradient, meta_row
from eagle_train.types import PackedBatch

TEXT = 64
"""Tokens beside those of a tile in the shortest row that is counted."""
TARGETS = 8
"""Positions with loss in it."""
CONVENTION = (
    "2 FLOPs per multiply-add of matrix products and convolutions of forward and backward, as torch's FlopCounterMode"
    " counts them, but for the weight's gradient of convolutions in groups, which it takes for one without. MFU: each"
    " product once; attention of packed samples is the sum of their squared lengths, halved because it is causal; "
    "what is frozen has no products for gradients that nobody needs; the head and the last layer's MLP count tokens "
    "with a label; placeholder tiles count nothing. HFU adds what is computed again: checkpointed layers, logits of "
    "chunks, scores of attention kernels, and placeholder tiles. Seconds are whole steps, waiting for data included; "
    "checkpoints and evaluation are not. Peak is dense bfloat16."
)
"""What `perf/mfu` and `perf/hfu` mean; written wherever they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """What the FLOPs of a row depend on."""

    tokens: int
    squares: int
    """Sum of the squared lengths of its samples."""
    targets: int
    """Positions with a label."""
    tiles: int
    """Real tiles; with none there is a placeholder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassFlops:
    """FLOPs of a forward and backward pass over a row."""

    per_token: float
    per_square: float
    """Per squared length of a sample; causal: half of what the full square takes."""
    per_target: float
    per_tile: float
    placeholder: float
    """Of a row without real tiles."""

    def of(self, counts: RowCounts) -> float:
        """Returns the FLOPs of a row."""
        return (
            self.per_token * counts.tokens
            + self.per_square * counts.squares
            + self.per_target * counts.targets
            + (self.per_tile * counts.tiles if counts.tiles else self.placeholder)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """FLOPs of rows as MFU and as HFU count them; see `CONVENTION`."""

    useful: PassFlops
    """Every product once."""
    executed: PassFlops
    """With what is computed again."""

    def of(self, row: PackedBatch) -> tuple[float, float]:
        """Returns the useful and the executed FLOPs of a row, forward and backward."""
        counts = row_counts(row)
        return self.useful.of(counts), self.executed.of(counts)


def row_counts(row: PackedBatch) -> RowCounts:
    """Returns what the FLOPs of a row, or of a part of one, depend on; a row on a GPU would have to be waited for."""
    lengths = row.cu_seqlens.diff().long()
    ranks = 1 if row.part is None else row.part.size  # heads are shared, the samples are those of the whole row
    return RowCounts(
        tokens=row.num_tokens,
        squares=int((lengths * lengths).sum()) // ranks,
        targets=row.num_targets,
        tiles=row.num_images,
    )


def step_flops(model: nn.Module, tile_size: int, *, recomputed: bool) -> StepFlops:
    """Returns the FLOPs of training `model`, which is left as it is.

    Args:
        model: of a stage, on the meta device, with its frozen parameters marked so.
        tile_size: S in pixels.
        recomputed: whether the engine recomputes activations in the backward pass.
    """
    seen: dict[Hashable, Any] = {}
    plain, as_run = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    plain.llm.get_output_embeddings().token_losses = plain_losses
    if isinstance(as_run.llm.get_output_embeddings().token_losses, LigerCrossEntropy):
        # It needs a GPU; of losses per token it makes the logits again in the backward pass, as ours.
        as_run.llm.get_output_embeddings().token_losses = ChunkedCrossEntropy()
    if recomputed:
        as_run.set_activation_checkpointing()
    useful = Passes.of(plain, tile_size, seen).flops(scores_again=False)
    executed = Passes.of(as_run, tile_size, seen).flops(scores_again=True)
    return StepFlops(useful=replace(useful, placeholder=0.0), executed=executed)


@dataclass(frozen=True, slots=True)
class Passes:
    """FLOPs by operation of passes of a model over small rows."""

    length: int
    """Tokens of the shorter rows."""
    text: Counter[str]
    """A row without tiles."""
    long: Counter[str]
    """The same, twice as long."""
    tile: Counter[str]
    """A row with a tile."""
    labelled: Counter[str]
    """The same, with twice as many labels."""

    @classmethod
    def of(cls, model: nn.Module, tile_size: int, seen: dict[Hashable, Any]) -> Passes:
        """Runs them; see `count_pass`."""
        tokens_per_tile = model.mixture.tokens_per_tile
        length = tokens_per_tile + TEXT
        rows = (
            meta_row(
                tokens,
                num_tiles=tiles,
                num_targets=targets,
                tokens_per_tile=tokens_per_tile,
                tile_size=tile_size,
                example=model.mixture.example,
            )
            for tokens, tiles, targets in (
                (length, 0, TARGETS),
                (2 * length, 0, TARGETS),
                (length, 1, TARGETS),
                (length, 0, 2 * TARGETS),
            )
        )
        return cls(length, *(count_pass(model, row, seen) for row in rows))

    def flops(self, *, scores_again: bool) -> PassFlops:
        """Returns what the passes tell; see `split_attention`."""
        text, long, tile, labelled = (
            split_attention(flops, scores_again=scores_again)
            for flops in (self.text, self.long, self.tile, self.labelled)
        )
        per_token = (long[0] - text[0]) / self.length
        per_square = (long[1] - text[1]) / (3 * self.length**2)
        per_target = (labelled[0] - text[0]) / TARGETS
        words = per_token * self.length + per_square * self.length**2 + per_target * TARGETS
        return PassFlops(
            per_token=per_token,
            per_square=per_square / 2,
            per_target=per_target,
            per_tile=sum(tile) - words,
            placeholder=sum(text) - words,
        )


def count_pass(model: nn.Module, row: PackedBatch, seen: dict[Hashable, Any]) -> Counter[str]:
    """Returns the FLOPs, by operation, of a forward and backward pass on the meta device; attention in full squares.

    Args:
        model: whose parameters keep no gradient.
        row: on the meta device.
        seen: see `FlopCounter`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(forget_gradient) for parameter in trained]
    with GpuKernels(), FlopCounter(seen) as counter:
        loss = model(row).sum()
        # Not `loss.backward()`, under which recomputed layers would take other kernels; see `activation_bytes`.
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
    for hook in hooks:
        hook.remove()
    return counter.flops


def split_attention(by_operation: Mapping[str, int], *, scores_again: bool) -> tuple[int, int]:
    """Returns the FLOPs of all other operations and those of fused attention.

    The backward pass of fused attention is five products of equal size, the first of which makes the scores again.
    """
    other = attention = 0
    for operation, flops in by_operation.items():
        if "attention" not in operation:
            other += flops
        elif "backward" in operation and not scores_again:
            attention += flops * 4 // 5
        else:
            attention += flops
    return other, attention


def plain_losses(
    hidden: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Returns the losses (P,) float32, see `TokenLosses`: each product once, all logits at once."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="none")
