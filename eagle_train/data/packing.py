"""Packing: which samples share a row of `capacity` tokens. Pure functions over lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heapify, heappop, heapreplace

import numpy as np

from eagle_train.data.completion import complete_rows

MANY = 8
"""Samples to a row, on average, from which on rows are filled by spreading."""
SPREADS = (2.0, 4.0, 1.6)
"""How long samples are spread over all rows, tried in this order: while the rows have room for so many more each."""
WASTE = 1 / 1000
"""Rows over the fewest thinkable with which trying ends, and over the fewest found that spreading may cost; a share."""
COMPLETIONS = ((15, 1), (8, 4))
"""What is tried where few samples fit into a row, in 64ths of it: the least that completes rows, and `enough`.

Found by trial on the mixes of scripts/bench/lengths.py, 4096 rows of 4096 tokens: the first is best where images are
one tile (4271 rows of eagle1_sft; the second makes 4311, best fit decreasing 4448), the second where they are tiled
(4606 rows of eagle2_sft; 4640 and 4644). A third, (8, 1), saves 2 rows of eagle25 and costs a second of planning.
"""
ROW_BITS = 24
"""A row's number takes the low bits of an integer that sorts by something else."""


def pack_rows(lengths: np.ndarray, costs: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of full length that cost about the same, flat: samples (n,) int64 and offsets (rows + 1,) int64.

    Row i holds the samples `samples[offsets[i]:offsets[i + 1]]`, indices into `lengths`, ascending.

    Where many samples fit into a row, the longest goes first. As long as the rows have room for several samples of
    its length, it goes to the row that costs least so far, out of as many rows as all tokens would fill: so long
    samples, images and attention spread evenly. The rest fills the rows up, each sample in the fullest row that
    still holds it. More or less of that is tried if it costs rows. Where few samples fit into a row, rows are
    completed one by one instead, since then each sample counts; what is short fills them up at the end. There are
    never more rows than best fit decreasing makes, but for `WASTE`.

    Args:
        lengths: (n,) tokens of each sample, in 1..capacity.
        costs: (n,) cost of each sample, in any unit.
        capacity: tokens of a row.

    Raises:
        ValueError: if a sample is empty or longer than a row.

    Source: best fit decreasing (D. S. Johnson, 1973), after the balanced knapsack of Eagle 2 (arXiv 2501.14818), which
        spreads all samples and so needs rows to spare; `complete_rows`.
    """
    if len(lengths) == 0:
        return np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    if not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"samples have {lengths.min()} to {lengths.max()} tokens, a row has {capacity}; raise the row's length "
            "or leave out the samples that do not fit"
        )
    lengths = lengths.astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    sizes, weights = lengths[order], whole_costs(costs if costs.any() else lengths)[order]
    fewest = -(-int(lengths.sum()) // capacity)
    if len(lengths) >= MANY * fewest:
        places, count = spread_rows(sizes, weights, capacity, fewest)
    else:
        places, count = fill_rows(sizes, capacity, fewest)
    row_of = np.empty(len(lengths), dtype=np.int64)
    row_of[order] = places
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=count))])
    return np.argsort(row_of, kind="stable"), offsets


def whole_costs(costs: np.ndarray) -> np.ndarray:
    """Returns (n,) int64 costs in parts of the largest: sums of integers are the same in any order."""
    return np.rint(costs * (2**20 / costs.max())).astype(np.int64)


def spread_rows(sizes: np.ndarray, weights: np.ndarray, capacity: int, fewest: int) -> tuple[list[int], int]:
    """Returns the row of each sample and the number of rows, with as much spreading as costs no rows, see `place`."""
    found = []
    for part in parts_to_try(sizes, fewest):
        found.append(place(sizes, weights, capacity, fewest, part))
        if found[-1][1] <= fewest * (1 + WASTE):
            break
    best = min(count for _, count in found)
    return next((places, count) for places, count in found if count <= best * (1 + WASTE))


def fill_rows(sizes: np.ndarray, capacity: int, fewest: int) -> tuple[list[int], int]:
    """Returns the row of each sample and the number of rows, the fewest that completion or best fit alone finds.

    Args:
        sizes: (n,) int64 tokens of the samples, descending.
        capacity: tokens of a row.
        fewest: rows with which trying ends.
    """
    lengths = sizes.tolist()
    best = best_fit(lengths, [], 0, capacity)
    for least, enough in COMPLETIONS:
        if best[1] <= fewest:
            break
        last = int(np.searchsorted(-sizes, -(capacity * least // 64), side="right"))
        places, room = complete_rows(sizes[:last], capacity, capacity * enough // 64)
        free = sorted(left << ROW_BITS | row for row, left in enumerate(room) if left)
        rest, count = best_fit(lengths[last:], free, len(room), capacity)
        if count < best[1]:
            best = places + rest, count
    return best


def parts_to_try(sizes: np.ndarray, num_rows: int) -> list[tuple[int, int]]:
    """Returns the parts of the samples that may be spread, the preferred first and the empty one last."""
    nothing = (len(sizes), len(sizes))
    parts = [spread_part(sizes, spread, num_rows) for spread in SPREADS]
    return list(dict.fromkeys([part for part in parts if part != nothing] + [nothing]))


def spread_part(sizes: np.ndarray, spread: float, num_rows: int) -> tuple[int, int]:
    """Returns the first and last + 1 of the samples to be spread, (n, n) if none.

    Args:
        sizes: (n,) int64 tokens of the samples, descending.
        spread: samples of the current size for which a row still has room, on average.
        num_rows: rows to be filled.
    """
    to_come = np.cumsum(sizes[::-1])[::-1]
    roomy = np.flatnonzero(to_come >= spread * num_rows * sizes)
    return (int(roomy[0]), int(roomy[-1]) + 1) if len(roomy) else (len(sizes), len(sizes))


def place(
    sizes: np.ndarray, weights: np.ndarray, capacity: int, num_rows: int, part: tuple[int, int]
) -> tuple[list[int], int]:
    """Returns the row of each sample and the number of rows: best fit, then spreading, then best fit.

    Args:
        sizes: (n,) int64 tokens of the samples, descending.
        weights: (n,) int64 costs of the samples.
        capacity: tokens of a row.
        num_rows: rows over which samples are spread.
        part: the first and last + 1 of the samples to be spread.
    """
    first, last = part
    lengths = sizes.tolist()
    free: list[int] = []
    places, count = best_fit(lengths[:first], free, 0, capacity)
    if first < len(lengths):
        room = [0] * count + [capacity] * (num_rows - count)
        for value in free:
            room[value & (1 << ROW_BITS) - 1] = value >> ROW_BITS
        loads = np.bincount(np.array(places, dtype=np.int64), weights[:first], len(room)).astype(np.int64).tolist()
        places += spread_out(lengths[first:last], weights[first:last].tolist(), room, loads)
        free = sorted(left << ROW_BITS | row for row, left in enumerate(room) if left)
        rest, count = best_fit(lengths[len(places) :], free, len(room), capacity)
        places += rest
    return places, count


def best_fit(lengths: list[int], free: list[int], count: int, capacity: int) -> tuple[list[int], int]:
    """Returns the row of each sample, the fullest that still holds it, and the number of rows.

    Args:
        lengths: tokens of the samples.
        free: tokens left and number of each row with room, as one integer, ascending; kept up to date.
        count: rows there are; new ones are opened as needed.
        capacity: tokens of a row.
    """
    places = []
    for length in lengths:
        needed = length << ROW_BITS
        place = bisect_left(free, needed)
        if place < len(free):
            left = free.pop(place) - needed
        else:
            left = (capacity - length) << ROW_BITS | count
            count += 1
        places.append(left & (1 << ROW_BITS) - 1)
        if left >> ROW_BITS:
            insort(free, left)
    return places, count


def spread_out(lengths: list[int], weights: list[int], room: list[int], loads: list[int]) -> list[int]:
    """Returns the row of each sample, the one of least load; fewer if a sample fits none of the rows left.

    Args:
        lengths: tokens of the samples, descending.
        weights: costs of the samples.
        room: tokens left in each row; kept up to date.
        loads: cost of each row so far.
    """
    heap = [load << ROW_BITS | row for row, load in enumerate(loads)]
    heapify(heap)
    places = []
    for length, weight in zip(lengths, weights, strict=True):
        # A row without room for this sample is set aside; shorter samples may still fill it up.
        while heap and room[heap[0] & (1 << ROW_BITS) - 1] < length:
            heappop(heap)
        if not heap:
            break
        row = heap[0] & (1 << ROW_BITS) - 1
        room[row] -= length
        heapreplace(heap, heap[0] + (weight << ROW_BITS))
        places.append(row)
    return places
