"""The plan: which samples share which row, window by window. It does not know the cluster.

A pure function of the catalog, the repeats, the seed and a few numbers: no rank, no worker, no world size. A window
is a group of shards in the epoch's order; its rows depend on nothing outside it, so any window can be made at any
time, alone, and memory is bounded by its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from eagle_train.data.balance import CostModel
from eagle_train.data.catalog import Catalog
from eagle_train.data.mixing import Piece, epoch_pieces, piece_rows, shuffle_pieces
from eagle_train.data.packing import pack_rows
from eagle_train.data.shuffle import shuffled

PLAN_VERSION = 2
"""Part of a plan's identity: to be raised where the same data and settings give other rows, or in another order."""
SAMPLES = 3
"""Stream of random numbers, besides those of `mixing`."""
MAX_WINDOW_SAMPLES = 250_000
"""A window closes after the piece with which it holds so many, however short they are: it is packed within a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What the plan depends on besides the data.

    Args:
        max_length: tokens of a row.
        rows_per_step: global batch in rows.
        window_rows: a window closes after the piece with which it holds the tokens of this many rows.
        repeats: passes over each source per epoch.
        num_epochs: epochs of the stage; None: as many as its steps take.
        cost: what a row costs, for rows and steps that are alike.
        seed: of all shuffles.
    """

    max_length: int
    rows_per_step: int
    window_rows: int
    repeats: tuple[Fraction, ...]
    num_epochs: int | None
    cost: CostModel
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """The rows of a window (m rows of n samples): row i holds `samples[offsets[i]:offsets[i + 1]]`."""

    samples: np.ndarray
    """(n,) int64, sample numbers in the catalog."""
    offsets: np.ndarray
    """(m + 1,) int64."""
    num_tokens: np.ndarray
    """(m,) int64."""
    num_tiles: np.ndarray
    """(m,) int64."""
    costs: np.ndarray
    """(m,) int64, see `CostModel`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> np.ndarray:
        """Returns the sample numbers of a row."""
        return self.samples[self.offsets[number] : self.offsets[number + 1]]


def epoch_windows(catalog: Catalog, config: PlanConfig, epoch: int) -> list[list[Piece]]:
    """Returns the pieces of each window of an epoch; this looks at shards, not at samples."""
    wanted = config.window_rows * config.max_length
    windows: list[list[Piece]] = [[]]
    tokens, samples = 0, 0
    for piece in shuffle_pieces(catalog, epoch_pieces(catalog, config.repeats, epoch), config.seed, epoch):
        if tokens >= wanted or samples >= MAX_WINDOW_SAMPLES:
            windows.append([])
            tokens, samples = 0, 0
        summary = catalog.shards[piece.shard].summary
        windows[-1].append(piece)
        tokens += summary.num_tokens * piece.count // summary.num_samples
        samples += piece.count
    return windows if windows[0] else []


def plan_window(catalog: Catalog, config: PlanConfig, pieces: Sequence[Piece], epoch: int, number: int) -> Window:
    """Returns the rows of a window."""
    numbers, lengths, tiles, pairs, targets = (
        np.concatenate(column) for column in zip(*read_pieces(catalog, pieces, config.seed), strict=True)
    )
    order = shuffled(np.arange(len(numbers)), config.seed, epoch, SAMPLES, number)
    numbers, lengths, tiles = numbers[order], lengths[order].astype(np.int64), tiles[order].astype(np.int64)
    costs = config.cost.sample_costs(lengths, tiles, pairs[order], targets[order])
    order, offsets = pack_rows(lengths, costs, config.max_length)
    sums = [np.add.reduceat(column[order], offsets[:-1]) for column in (lengths, tiles, costs)]
    return Window(numbers[order], offsets, *sums)


def read_pieces(catalog: Catalog, pieces: Sequence[Piece], seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields number, tokens, tiles, pairs of tiles and labels of the usable samples of each piece."""
    for piece in pieces:
        sizes = catalog.sizes(piece.shard)
        rows = piece_rows(piece, len(sizes), seed)
        rows = rows[sizes.num_tokens[rows] > 0]
        yield (
            catalog.starts[piece.shard] + rows,
            sizes.num_tokens[rows],
            sizes.num_tiles[rows],
            sizes.num_tile_pairs[rows],
            sizes.num_targets[rows],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanTotals:
    """Sums over all rows of a plan."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    tiles: int = 0


def count_rows(catalog: Catalog, config: PlanConfig, progress: Callable[[int], None] = lambda _: None) -> PlanTotals:
    """Returns the totals of all epochs; every window is made once, and forgotten.

    Args:
        progress: called with the number of rows counted since the last call.
    """
    assert config.num_epochs is not None
    rows = samples = tokens = tiles = 0
    for epoch in range(config.num_epochs):
        for number, pieces in enumerate(epoch_windows(catalog, config, epoch)):
            window = plan_window(catalog, config, pieces, epoch, number)
            rows += len(window)
            samples += len(window.samples)
            tokens += int(window.num_tokens.sum())
            tiles += int(window.num_tiles.sum())
            progress(len(window))
    return PlanTotals(rows=rows, samples=samples, tokens=tokens, tiles=tiles)
