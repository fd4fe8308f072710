"""Averaging policies of the loss: the weights of a sample's tokens, from which of them are supervised.

The trainer divides the weighted sum by the sum of the weights over all rows and ranks of a step, so only ratios matter,
and neither packing nor the number of ranks or micro-batches does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LossWeight = Callable[[np.ndarray], np.ndarray]
"""Takes (T,) bool, which tokens are supervised (one at least); returns (T,) float32 weights, 0 for the others."""


def per_token(supervised: np.ndarray) -> np.ndarray:
    """Returns 1: every supervised token counts the same (LLaVA, Eagle 1)."""
    return supervised.astype(np.float32)


def per_sample(supervised: np.ndarray) -> np.ndarray:
    """Returns 1 / n: every sample counts the same, however many supervised tokens n it has."""
    return supervised.astype(np.float32) / int(np.count_nonzero(supervised))


def square_root(supervised: np.ndarray) -> np.ndarray:
    """Returns n^-1/2, between the two: a sample counts n^1/2 (Eagle 2, arXiv 2501.14818; InternVL 2.5)."""
    return supervised.astype(np.float32) * int(np.count_nonzero(supervised)) ** -0.5


def square_root_per_turn(supervised: np.ndarray) -> np.ndarray:
    """Returns n^-1/2 with n of each turn by itself: an answer counts the same alone and in a dialogue.

    A turn is a run of supervised tokens; Eagle 2.5's code has this as `multi_turn_scale`.
    """
    begins = supervised & ~np.concatenate([[False], supervised[:-1]])
    turns = np.cumsum(begins)  # begins [0,1,0,0,1] -> [0,1,1,1,2]; what follows a turn has its number, and weight 0
    lengths = np.bincount(turns, weights=supervised)
    lengths[0] = 1.0  # before the first turn, where none is supervised
    return (supervised * lengths[turns] ** -0.5).astype(np.float32)
