"""The language-modelling loss, piece by piece, so that the logits of a long row never exist at once."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eagle_train.types import IGNORE_INDEX


def token_losses(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, chunk: int) -> torch.Tensor:
    """Returns the cross-entropy of every token, (T,) float32; 0 where there is no label.

    Args:
        head: the LM head, (..., H) -> (..., vocabulary). It is called as a module, never through its
            weight: under ZeRO-3 a weight touched outside its module's forward is an empty shard.
        hidden: (T, H) last hidden states.
        labels: (T,) int64, already shifted.
        chunk: positions whose logits are held at a time; they are recomputed in the backward pass.
    """
    losses = hidden.new_zeros(len(labels), dtype=torch.float32)
    places = torch.nonzero(labels != IGNORE_INDEX).squeeze(1)
    if len(places) == 0:
        # The head still runs: every rank must run the same modules.
        return losses + 0.0 * head(hidden[:1]).float().sum()
    pieces = []
    for some in places.split(chunk):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(losses_of, head, hidden[some], labels[some], use_reentrant=False))
        else:
            pieces.append(losses_of(head, hidden[some], labels[some]))
    return losses.index_copy(0, places, torch.cat(pieces))


def losses_of(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns (P,) float32 losses of hidden states (P, H) and labels (P,)."""
    return F.cross_entropy(head(hidden).float(), labels, reduction="none")
