"""The language-modelling loss, piece by piece, so that the logits of a long row never exist at once.

torch's own `F.linear_cross_entropy` (2.15) is no choice: of bfloat16 states its losses are bfloat16, summed in chunks
wrong by 1.9 % (13568 for 13320.2; ours 13320.3), and exact ones would ask for float32 copies of states and head.

Shape letters: P supervised positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from eagle_train.types import IGNORE_INDEX

TokenLosses = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Hidden states (P, H), labels (P,), weight (V, H) and bias (V,) or None -> cross-entropies (P,) float32."""

LIGER = (0, 8, 5)
"""The first release of Liger that has the gradient of a loss per token."""


class ChunkedCrossEntropy:
    """Cross-entropy of a linear head whose logits exist for `chunk` positions at a time, in both passes.

    Beside its inputs it keeps one number per position. Logits are made in the dtype of the head (autocast's,
    where that is on); everything from there on, the sum of the weight's gradient over chunks too, is float32.

    Args:
        chunk: positions whose logits are held at a time.

    Raises:
        ValueError: if `chunk` is below 1.
    """

    def __init__(self, chunk: int = 1024) -> None:
        if chunk < 1:
            raise ValueError(f"logits are made for at least 1 position at a time, not {chunk}")
        self.chunk = chunk

    def __call__(
        self, hidden_PH: torch.Tensor, labels_P: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the losses (P,) float32; see `TokenLosses`."""
        return LinearCrossEntropy.apply(hidden_PH, labels_P, weight_VH, bias_V, self.chunk, compute_dtype(hidden_PH))


class LigerCrossEntropy:
    """The same by Liger's fused kernels, on CUDA; needs `pip install eagle-train[liger]`.

    Its chunk follows from the sizes of vocabulary and hidden states. The weight's gradient is summed in float32.
    Liger is asked for when losses are, so that a run can be planned and its model loaded without it.

    Raises:
        ValueError: when called without a GPU or without Liger.
    """

    def __call__(
        self, hidden_PH: torch.Tensor, labels_P: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the losses (P,) float32; see `TokenLosses`."""
        if hidden_PH.device.type != "cuda":
            raise ValueError(f"Liger's kernels need a GPU, the model is on {hidden_PH.device}; use loss=chunked")
        losses_of = ligers_loss()(reduction="none", accum_dtype=torch.float32)
        return losses_of(weight_VH, hidden_PH.to(compute_dtype(hidden_PH)), labels_P, bias_V)


def ligers_loss() -> Callable[..., Callable[..., torch.Tensor]]:
    """Returns Liger's module of the fused loss.

    Raises:
        ValueError: if Liger is not there, or a release that scales every token's gradient by the first one's weight.
    """
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise ValueError("loss=liger: pip install 'eagle-train[liger]', or use loss=chunked") from error
    found = version("liger-kernel")
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < LIGER:
        raise ValueError(
            f"loss=liger: liger-kernel {found} has wrong gradients of losses per token; pip install -U "
            f"'eagle-train[liger]', or use loss=chunked"
        )
    return LigerFusedLinearCrossEntropyLoss


class LossHead(nn.Linear):
    """An LM head, (..., H) -> (..., V), that also gives the losses of its tokens.

    All pieces of a row are one call of the module: under ZeRO-3 a weight is whole inside its module's forward
    only, and ranks that called it unequally often would wait for each other without end.

    Args:
        head: the head whose weight and bias it takes over.
        token_losses: how losses are computed.
    """

    def __init__(self, head: nn.Linear, token_losses: TokenLosses) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight = head.weight
        self.bias = head.bias
        self.token_losses = token_losses

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns logits; with labels, the cross-entropy of every token, (T,) float32, 0 where there is none.

        Args:
            hidden: (..., H) last hidden states; (T, H) with labels.
            labels: (T,) int64, already shifted.
            places: (P,) int64, the positions that have a label; None: see `target_places`.
        """
        if labels is None:
            return super().forward(hidden)
        losses = hidden.new_zeros(len(labels), dtype=torch.float32)
        if places is None:
            places = target_places(labels)
        if len(places) == 0:
            # The head is still used: every rank must have a gradient of it.
            return losses + 0.0 * super().forward(hidden[:1]).float().sum()
        # Selected once: in the backward pass, every further selection would be a tensor as large as `hidden`.
        hidden_PH = hidden.index_select(0, places)
        found = self.token_losses(hidden_PH, labels.index_select(0, places), self.weight, self.bias)
        return losses.index_copy(0, places, found)


def target_places(labels: torch.Tensor, num_targets: int | None = None) -> torch.Tensor:
    """Returns the positions that have a label, (P,) int64.

    Args:
        labels: (T,) int64.
        num_targets: P; None: they are counted, for which the host waits for a GPU.
    """
    supervised = labels != IGNORE_INDEX
    size = int(supervised.sum()) if num_targets is None else num_targets
    return torch.nonzero_static(supervised, size=size).squeeze(1)


class LinearCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="none")` in chunks."""

    @staticmethod
    def forward(
        ctx,
        hidden_PH: torch.Tensor,
        labels_P: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Returns the losses (P,) float32."""
        losses, sums = [], []
        for hidden, labels in zip(hidden_PH.split(chunk), labels_P.split(chunk), strict=True):
            logits = logits_of(hidden, weight_VH, bias_V, dtype)
            wanted = logits.gather(1, labels[:, None]).squeeze(1)
            largest = logits.amax(dim=1)
            # In place: `torch.logsumexp` would hold the chunk's logits twice.
            sums.append(logits.sub_(largest[:, None]).exp_().sum(dim=1).log_().add_(largest))
            losses.append(sums[-1] - wanted)
        ctx.save_for_backward(hidden_PH, labels_P, weight_VH, bias_V, torch.cat(sums))
        ctx.chunk, ctx.dtype = chunk, dtype
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_P: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of hidden states, weight and bias."""
        hidden_PH, labels_P, weight_VH, bias_V, sums_P = ctx.saved_tensors
        hidden_asked, _, weight_asked, bias_asked, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_PH) if hidden_asked else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if weight_asked else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if bias_asked else None
        for begin in range(0, len(labels_P), ctx.chunk):
            some = slice(begin, begin + ctx.chunk)
            logits = logits_of(hidden_PH[some], weight_VH, bias_V, ctx.dtype)
            grad = logits.sub_(sums_P[some, None]).exp_()  # probabilities
            grad.scatter_add_(1, labels_P[some, None], grad.new_full((len(grad), 1), -1.0)).mul_(grad_P[some, None])
            if bias_asked:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(ctx.dtype)
            if hidden_asked:
                grad_hidden[some] = grad @ weight_VH.to(ctx.dtype)
            if weight_asked:
                add_product(grad_weight, grad.T, hidden_PH[some].to(ctx.dtype))
        return (
            grad_hidden,
            None,
            grad_weight.to(weight_VH.dtype) if weight_asked else None,
            grad_bias.to(bias_V.dtype) if bias_asked else None,
            None,
            None,
        )


def logits_of(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Returns float32 logits (chunk, V) of hidden states (chunk, H), multiplied in `dtype`."""
    return F.linear(hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)).float()


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds `left @ right` to a float32 `total` without rounding it to the factors' dtype on the way."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.device.type == "cpu":
        total.addmm_(left.float(), right.float())  # the CPU has no product of another dtype than its factors'
    else:
        total += torch.mm(left, right, out_dtype=torch.float32)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which matrices are multiplied now: autocast's where that is on, else the tensor's own."""
    kind = tensor.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype
