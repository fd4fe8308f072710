"""The language-modelling loss, piece by piece, so that the logits of a long row never exist at once."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eagle_train.types import IGNORE_INDEX


class LossHead(nn.Linear):
    """An LM head, (..., H) -> (..., vocabulary), that also gives the losses of its tokens.

    All pieces of a row are one call of the module: under ZeRO-3 a weight is whole inside its module's forward
    only, and ranks that called it unequally often would wait for each other without end.

    Args:
        head: the head whose weight and bias it takes over.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None, chunk: int = 1024) -> torch.Tensor:
        """Returns logits; with labels, the cross-entropy of every token, (T,) float32, 0 where there is none.

        Args:
            hidden: (..., H) last hidden states; (T, H) with labels.
            labels: (T,) int64, already shifted.
            chunk: positions whose logits are held at a time; they are recomputed in the backward pass.
        """
        if labels is None:
            return super().forward(hidden)
        losses = hidden.new_zeros(len(labels), dtype=torch.float32)
        places = torch.nonzero(labels != IGNORE_INDEX).squeeze(1)
        if len(places) == 0:
            # The head is still used: every rank must have a gradient of it.
            return losses + 0.0 * super().forward(hidden[:1]).float().sum()
        pieces = []
        for some in places.split(chunk):
            if torch.is_grad_enabled():
                pieces.append(checkpoint(self.losses_of, hidden[some], labels[some], use_reentrant=False))
            else:
                pieces.append(self.losses_of(hidden[some], labels[some]))
        return losses.index_copy(0, places, torch.cat(pieces))

    def losses_of(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns (P,) float32 losses of hidden states (P, H) and labels (P,)."""
        return F.cross_entropy(super().forward(hidden).float(), labels, reduction="none")
