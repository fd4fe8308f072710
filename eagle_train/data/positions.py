"""Position ids of a sample, by which its LLM turns queries and keys: counted on, or in time, rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eagle_train.types import Grid

Positions = Callable[[int, np.ndarray, Sequence[Grid]], np.ndarray]
"""From a sample's T tokens, the places (M,) int64 of its visual tokens and its grids to (T,) or (4, T) int64."""


def sequential(length: int, image_positions: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """Returns (T,) int64: tokens counted from 0, whatever they are."""
    del image_positions, grids
    return np.arange(length)


def multimodal_rotary(length: int, image_positions: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """Returns (4, T) int64: the count of tokens, then step, row and column, which text has all alike.

    A picture begins one beyond the largest position before it, and its tokens stand at their step, row and column from
    there; so does the text behind it. Hence no two tokens of a sample share all positions, however long a video is.

        text, text, picture of 1 x 2 x 2, text:  counts  0 1 2 3 4 5 6
                                                 steps   0 1 2 2 2 2 4
                                                 rows    0 1 2 2 3 3 4
                                                 columns 0 1 2 3 2 3 4

    Raises:
        ValueError: if the tokens of a picture do not stand side by side, or are not as many as its grid has.

    Source: Qwen2-VL (arXiv 2409.12191), M-RoPE; QwenLM/Qwen3-VL, `rope2d.py`. transformers 5.23 goes on behind a
    picture without regard to its steps.
    """
    found = np.empty((4, length), np.int64)
    found[0] = np.arange(length)
    at, free, place = 0, 0, 0  # tokens done, the next free position, visual tokens done
    for grid in grids:
        count = grid[0] * grid[1] * grid[2]
        where = image_positions[place : place + count]
        if len(where) < count or where[-1] - where[0] != count - 1:
            raise ValueError(f"a picture of {grid} tiles has no {count} places side by side; {len(where)} are left")
        first = int(where[0])
        found[1:, at:first] = np.arange(free, free + first - at)
        free += first - at
        found[1:, first : first + count] = np.indices(grid).reshape(3, -1) + free
        at, free, place = first + count, free + max(grid), place + count
    if place < len(image_positions):
        raise ValueError(f"the grids {list(grids)} have {place} tiles, there are {len(image_positions)} visual tokens")
    found[1:, at:] = np.arange(free, free + length - at)
    return found
