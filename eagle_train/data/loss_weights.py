"""Averaging policies of the loss: the weights of a sample's tokens, from which of them are supervised.

The trainer divides the weighted sum by the sum of the weights over all rows and ranks of a step, so only ratios matter,
and neither packing nor the number of ranks or micro-batches does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LossWeight = Callable[[torch.Tensor], torch.Tensor]
"""Takes (T,) bool, which tokens are supervised (one at least); returns (T,) float32 weights, 0 for the others."""


def per_token(supervised: torch.Tensor) -> torch.Tensor:
    """Returns 1: every supervised token counts the same (LLaVA, Eagle 1)."""
    return supervised.float()


def per_sample(supervised: torch.Tensor) -> torch.Tensor:
    """Returns 1 / n: every sample counts the same, however many supervised tokens n it has."""
    return supervised.float() * (1.0 / int(supervised.sum()))


def square_root(supervised: torch.Tensor) -> torch.Tensor:
    """Returns n^-1/2, between the two: a sample counts n^1/2 (Eagle 2, arXiv 2501.14818; InternVL 2.5)."""
    return supervised.float() * int(supervised.sum()) ** -0.5


def square_root_per_turn(supervised: torch.Tensor) -> torch.Tensor:
    """Returns n^-1/2 with n of each turn by itself: an answer counts the same alone and in a dialogue.

    A turn is a run of supervised tokens; Eagle 2.5's code has this as `multi_turn_scale`.
    """
    begins = supervised & ~torch.cat([supervised.new_zeros(1), supervised[:-1]])
    turns = begins.cumsum(0)  # [0,1,1,0,1] -> [0,1,1,1,2]; tokens between turns have a number too, and weight 0
    lengths = torch.bincount(turns, weights=supervised.double())
    lengths[0] = 1.0  # before the first turn, where none is supervised
    return supervised.float() * lengths.rsqrt().float()[turns]
