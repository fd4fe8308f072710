"""How other trainers pack, written from descriptions of their policies; for the benchmark of packing.

Each takes tokens and tiles of samples in the order in which they come and returns rows as (samples, offsets).
"""

from __future__ import annotations

import random
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from heapq import heapreplace

import numpy as np

Packed = tuple[np.ndarray, np.ndarray]
Packer = Callable[[np.ndarray, np.ndarray, int], Packed]


def flat(rows: Iterable[list[int]]) -> Packed:
    """Returns rows without the empty ones, as samples and offsets."""
    rows = [row for row in rows if row]
    return np.array([sample for row in rows for sample in row]), np.cumsum([0, *map(len, rows)])


def knapsacks(tokens: np.ndarray, samples: np.ndarray, capacity: int, delta: int) -> list[list[int]]:
    """Returns balanced knapsacks: the longest sample first, into the least loaded of ceil(sum / capacity) + delta.

    Where it does not fit, one knapsack more is opened.
    """
    count = -(-int(tokens[samples].sum()) // capacity) + delta
    rows: list[list[int]] = [[] for _ in range(count)]
    heap = list(range(count))  # tokens * 2**32 + row
    for sample in samples[np.argsort(-tokens[samples], kind="stable")].tolist():
        length = int(tokens[sample])
        row = heap[0] & 0xFFFFFFFF
        if (heap[0] >> 32) + length > capacity:
            row = len(rows)
            rows.append([])
            heap.append(row)
            # A new row is the least loaded: it goes to the top, by sinking the old top.
            heap[0], heap[-1] = heap[-1], heap[0]
            sift_up(heap)
        rows[row].append(sample)
        heapreplace(heap, heap[0] + (length << 32))
    return rows


def sift_up(heap: list[int]) -> None:
    """Moves the last entry up to its place; the first is smaller than all."""
    place = len(heap) - 1
    while place > 0 and heap[place] < heap[parent := (place - 1) // 2]:
        heap[place], heap[parent] = heap[parent], heap[place]
        place = parent


def eagle25(tokens: np.ndarray, tiles: np.ndarray, capacity: int, megabatch: int | None = None) -> Packed:
    """Eagle 2.5 as released: knapsacks with 20 to spare, over all samples or in megabatches, then shuffled.

    Released, each rank packs its own share of the samples; here one packs all, which favours it.
    """
    del tiles
    rows = []
    for first in range(0, len(tokens), megabatch or len(tokens)):
        chosen = np.arange(first, min(first + (megabatch or len(tokens)), len(tokens)))
        rows += [row for row in knapsacks(tokens, chosen, capacity, 20) if row]
    random.Random(0).shuffle(rows)
    return flat(rows)


def eagle25_megabatch(tokens: np.ndarray, tiles: np.ndarray, capacity: int) -> Packed:
    """Eagle 2.5 with megabatches of 4000 samples, its function's default and its paper's buffer."""
    return eagle25(tokens, tiles, capacity, 4000)


def nanovlm(tokens: np.ndarray, tiles: np.ndarray, capacity: int) -> Packed:
    """nanoVLM: knapsacks with 5 to spare over buffers of 1024 rows' tokens, shuffled; without its cap on images."""
    del tiles
    buffers = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(np.cumsum(tokens) // (1024 * capacity))) + 1)
    rng, rows = random.Random(0), []
    for buffer in buffers:
        found = knapsacks(tokens, buffer, capacity, 5)
        rng.shuffle(found)
        rows += found
    return flat(rows)


def next_fit(tokens: np.ndarray, tiles: np.ndarray, capacity: int) -> Packed:
    """Eagle's streaming packer as it behaves: a sample that does not fit closes the row."""
    del tiles
    offsets, load = [0], 0
    for sample, length in enumerate(tokens.tolist()):
        if load + length > capacity:
            offsets.append(sample)
            load = 0
        load += length
    return np.arange(len(tokens)), np.array([*offsets, len(tokens)])


def buffered_best_fit(tokens: np.ndarray, tiles: np.ndarray, capacity: int) -> Packed:
    """Eagle's streaming packer as documented: the longest of up to 32 waiting samples that fits, else one more."""
    del tiles
    lengths = tokens.tolist()
    rows: list[list[int]] = [[]]
    room, coming, waiting = capacity, 0, []  # waiting: (tokens, sample), ascending
    while coming < len(lengths) or waiting:
        place = bisect_right(waiting, (room, len(lengths)))
        if place:
            length, sample = waiting.pop(place - 1)
        elif coming < len(lengths) and len(waiting) < 32:
            length, sample = lengths[coming], coming
            coming += 1
            if length > room:
                insort(waiting, (length, sample))
                continue
        else:
            rows.append([])
            room = capacity
            continue
        rows[-1].append(sample)
        room -= length
    return flat(rows)


def internvl(tokens: np.ndarray, tiles: np.ndarray, capacity: int) -> Packed:
    """InternVL: the first of up to 20 open rows, by tiles descending, in which tokens and tiles fit.

    A row holds 48 tiles for every 16,384 tokens, as in its scripts, and the tiles of any one sample. Full rows go
    out, and with more than 20 open the one with most tiles.
    """
    most_tiles = max(48 * capacity // 16_384, int(tiles.max()))
    open_rows: list[tuple[int, int, list[int]]] = []  # tiles, tokens, samples
    rows: list[list[int]] = []
    for sample, (length, visual) in enumerate(zip(tokens.tolist(), tiles.tolist(), strict=True)):
        found = (0, 0, [])
        for place, (row_tiles, row_tokens, _) in enumerate(open_rows):
            if row_tiles + visual <= most_tiles and row_tokens + length <= capacity:
                found = open_rows.pop(place)
                break
        found = (found[0] + visual, found[1] + length, [*found[2], sample])
        if found[1] == capacity or found[0] == most_tiles:
            rows.append(found[2])
            continue
        insort(open_rows, found, key=lambda row: -row[0])
        if len(open_rows) > 20:
            rows.append(open_rows.pop(0)[2])
    return flat(rows + [samples for _, _, samples in open_rows])


PEERS: dict[str, Packer] = {
    "Eagle 2.5, all samples": eagle25,
    "Eagle 2.5, megabatch 4000": eagle25_megabatch,
    "Eagle stream, released": next_fit,
    "Eagle stream, documented": buffered_best_fit,
    "InternVL first fit": internvl,
    "nanoVLM knapsack": nanovlm,
}


def fewest_rows(tokens: np.ndarray, capacity: int) -> int:
    """Returns a number of rows below which no packing can go.

    Source: dual feasible functions, S. P. Fekete and J. Schepers, New classes of fast lower bounds for bin packing
        problems, 2001: lengths rounded up to parts of a row; and with each e, samples longer than a row less e as
        whole rows, and shorter than e as nothing.
    """
    tokens = np.sort(tokens)
    best = -(-int(tokens.sum()) // capacity)
    for parts in range(1, 33):
        scaled = tokens * (parts + 1)
        # In units of 1 / (parts * capacity) of a row, so that all is whole.
        total = np.where(scaled % capacity == 0, tokens * parts, scaled // capacity * capacity).sum()
        best = max(best, -(-int(total) // (parts * capacity)))
    small = np.unique(tokens[2 * tokens <= capacity])
    if len(small):
        sums = np.concatenate([[0], np.cumsum(tokens)])
        first, last = np.searchsorted(tokens, small), np.searchsorted(tokens, capacity - small, side="right")
        best = max(best, -(-int(((len(tokens) - last) * capacity + sums[last] - sums[first]).max()) // capacity))
    return best
