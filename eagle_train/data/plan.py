"""The plan: which samples share which row, and which rows make which step. It does not know the cluster.

A pure function of the catalog, the seed and a few numbers: no rank, no worker, no world size. Rows are
numbered through all epochs of a stage, and step s of a stage takes rows s * R .. s * R + R - 1, so the
state of the data stream is one number. Windows (groups of shards) bound the memory of packing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eagle_train.data.catalog import Catalog
from eagle_train.data.packing import best_fit_decreasing

# Streams of random numbers, one per use.
SHARDS, SUBSETS, SAMPLES, ROWS = range(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What the plan depends on besides the data.

    Args:
        max_length: tokens of a row.
        seed: of all shuffles.
        window_samples: samples packed together; a window closes after the shard that reaches it.
        carry_below: rows of a window filled less than this are dissolved into the next window.
    """

    max_length: int
    seed: int = 0
    window_samples: int = 100_000
    carry_below: float = 0.97


@dataclass(frozen=True)
class Rows:
    """Rows of samples, flat: row i holds `samples[offsets[i]:offsets[i + 1]]`."""

    samples: np.ndarray
    """(m,) int64, sample numbers in the catalog."""
    offsets: np.ndarray
    """(num_rows + 1,) int64."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.samples[self.offsets[row] : self.offsets[row + 1]]


def plan_rows(catalog: Catalog, config: PlanConfig, *, num_epochs: int | None, num_rows: int | None) -> Rows:
    """Returns the rows of `num_epochs` epochs, or the first `num_rows` rows of as many as that takes.

    Raises:
        ValueError: if the catalog holds no usable sample.
    """
    if not (catalog.lengths > 0).any():
        raise ValueError(f"no usable sample in {[source.name for source in catalog.sources]}")
    rows: list[np.ndarray] = []
    epoch = 0
    while (epoch < num_epochs) if num_epochs is not None else (len(rows) < num_rows):
        before = len(rows)
        for window in plan_epoch(catalog, config, epoch):
            rows += window
            if num_rows is not None and len(rows) >= num_rows:
                break
        if len(rows) == before:
            repeats = {source.name: source.repeat for source in catalog.sources}
            raise ValueError(f"epoch {epoch} holds no sample: the sources' repeats are {repeats}; raise one")
        epoch += 1
    rows = rows[:num_rows]
    return Rows(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))


def plan_epoch(catalog: Catalog, config: PlanConfig, epoch: int) -> Iterator[list[np.ndarray]]:
    """Yields the rows of one epoch, window by window, each row an array of sample numbers."""
    windows = list(epoch_windows(catalog, config, epoch))
    carried = np.empty(0, dtype=np.int64)
    for number, window in enumerate(windows):
        samples = shuffled(np.concatenate([carried, window]), config.seed, epoch, SAMPLES, number)
        packed = best_fit_decreasing(catalog.lengths[samples], config.max_length)
        rows = [samples[row] for row in packed]
        carried = np.empty(0, dtype=np.int64)
        if number < len(windows) - 1:
            full = [catalog.lengths[row].sum() >= config.carry_below * config.max_length for row in rows]
            leftover = [row for row, keep in zip(rows, full, strict=True) if not keep]
            rows = [row for row, keep in zip(rows, full, strict=True) if keep]
            carried = np.concatenate([carried, *leftover])
            if len(carried) > config.window_samples:  # samples too long to share rows: carrying on is no use
                rows, carried = rows + leftover, carried[:0]
        order = shuffled(np.arange(len(rows)), config.seed, epoch, ROWS, number)
        yield [rows[i] for i in order]


def epoch_windows(catalog: Catalog, config: PlanConfig, epoch: int) -> Iterator[np.ndarray]:
    """Yields the sample numbers of each window of an epoch: shards in seeded order, grouped.

    A source with `repeat` r comes floor(r) times, and a seeded share r - floor(r) of it once more.
    """
    pieces: list[np.ndarray] = []
    for source_id, source in enumerate(catalog.sources):
        numbers = np.flatnonzero((catalog.source_ids == source_id) & (catalog.lengths > 0))
        whole = int(source.repeat)
        share = round((source.repeat - whole) * len(numbers))
        part = shuffled(numbers, config.seed, epoch, SUBSETS, source_id)[:share]
        for chosen in [*[numbers] * whole, np.sort(part)]:
            borders = np.flatnonzero(np.diff(catalog.shard_ids[chosen])) + 1
            pieces += [piece for piece in np.split(chosen, borders) if len(piece)]
    window: list[np.ndarray] = []
    for index in shuffled(np.arange(len(pieces)), config.seed, epoch, SHARDS, 0):
        window.append(pieces[index])
        if sum(map(len, window)) >= config.window_samples:
            yield np.concatenate(window)
            window = []
    if window:
        yield np.concatenate(window)


def shuffled(values: np.ndarray, seed: int, epoch: int, stream: int, number: int) -> np.ndarray:
    """Returns `values` in an order given by a hash of (seed, epoch, stream, number, place).

    Integer arithmetic only, so the order is the same on every machine and under every numpy.
    """
    hashes = splitmix64(np.arange(len(values)), seed, epoch, stream, number)
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


def step_rows(step: int, rows_per_step: int, num_rows: int, rank: int, world_size: int) -> list[int]:
    """Returns the row numbers rank `rank` runs in `step`, one per micro-batch; -1 is an empty row.

    Every rank gets the same number of micro-batches; where the rows of a step do not divide, or the last
    step is short, the ranks short of one run an empty row of weight zero.
    """
    first = step * rows_per_step
    rows = list(range(first, min(first + rows_per_step, num_rows)))
    micro_batches = -(-rows_per_step // world_size)
    mine = rows[rank::world_size]
    return mine + [-1] * (micro_batches - len(mine))


def fingerprint(parts: dict[str, object]) -> dict[str, str]:
    """Returns a short hash of each part of the plan's identity, so that a difference can be named."""
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()[:16]
        for name, value in parts.items()
    }
