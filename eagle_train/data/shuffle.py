"""Shuffling by hashes: the same order on every machine and under every numpy."""

from __future__ import annotations

import numpy as np


def shuffled(values: np.ndarray, *keys: int) -> np.ndarray:
    """Returns `values` in an order given by a hash of the place under `keys`, each in 0..2**64 - 1.

    Integer arithmetic only, so the order does not depend on the machine.
    """
    hashes = splitmix64(np.arange(len(values)), *keys)
    return values[np.argsort(hashes, kind="stable")]


def splitmix64(values: np.ndarray, *keys: int) -> np.ndarray:
    """Returns (n,) uint64 hashes of `values` under `keys`.

    Source: S. Vigna's SplitMix64 (public domain), chained over the keys.
    """
    state = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        for key in (*keys, 0):
            state = state + np.uint64(key) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state
