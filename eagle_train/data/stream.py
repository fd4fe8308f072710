"""The stream of steps: windows made in the background, their rows in order, cut into steps.

Its whole state is a `Cursor`: where the window stands that holds the next row. Rows are numbered through all
windows and epochs of a stage; step s holds the rows s * R to s * R + R - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from eagle_train.data.balance import order_rows
from eagle_train.data.catalog import Catalog
from eagle_train.data.mixing import Piece
from eagle_train.data.plan import PlanConfig, PlanTotals, Window, epoch_windows, plan_window
from eagle_train.data.shuffle import splitmix64


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """The window that holds the next row, and the number of rows before that window."""

    epoch: int = 0
    window: int = 0
    first_row: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The rows of one optimizer step, over all ranks; the last step of a stage may have fewer."""

    number: int
    first_row: int
    """Number of its first row in the stage."""
    rows: tuple[np.ndarray, ...]
    """Sample numbers of each row."""
    costs: np.ndarray
    """(number of rows,) int64, see `CostModel`."""
    num_tokens: int
    num_tiles: int
    read: np.ndarray
    """(number of sources,) int64: samples of each source in these rows."""
    after: Cursor
    """Where the stream stands after this step."""


def steps(
    catalog: Catalog, config: PlanConfig, *, first: int = 0, end: int | None = None, cursor: Cursor | None = None
) -> Iterator[Step]:
    """Yields the steps from `first` up to `end` (None: to the end of the last epoch).

    Args:
        cursor: a place at or before step `first`; None: the beginning, from which all windows are made again.

    Raises:
        ValueError: if there is no sample to take.
    """
    size = config.rows_per_step
    number, rows = first, []
    for at, window in windows(catalog, config, cursor or Cursor()):
        done = max(0, number * size + len(rows) - at.first_row)
        own_seed = int(splitmix64(np.array([at.window]), config.seed, at.epoch)[0])
        for row in order_rows(window.costs, size, at.first_row, own_seed)[done:].tolist():
            if end is not None and number >= end:
                return
            rows.append(RowOf(at, window, row))
            if len(rows) == size:
                yield make_step(catalog, number, size, rows)
                number, rows = number + 1, []
    if rows:
        yield make_step(catalog, number, size, rows)


class RowOf(NamedTuple):
    """A row of a window."""

    at: Cursor
    window: Window
    number: int


def make_step(catalog: Catalog, number: int, size: int, rows: Sequence[RowOf]) -> Step:
    """Returns the step that holds these rows."""
    samples = tuple(row.window.row(row.number) for row in rows)
    return Step(
        number=number,
        first_row=number * size,
        rows=samples,
        costs=np.array([row.window.costs[row.number] for row in rows]),
        num_tokens=sum(int(row.window.num_tokens[row.number]) for row in rows),
        num_tiles=sum(int(row.window.num_tiles[row.number]) for row in rows),
        read=catalog.count_sources(np.concatenate(samples)),
        after=rows[-1].at,
    )


def count_steps(catalog: Catalog, config: PlanConfig, num_steps: int) -> PlanTotals:
    """Returns the totals of the first `num_steps` steps."""
    rows = samples = tokens = tiles = 0
    for step in steps(catalog, config, end=num_steps):
        rows += len(step.rows)
        samples += int(step.read.sum())
        tokens += step.num_tokens
        tiles += step.num_tiles
    return PlanTotals(rows=rows, samples=samples, tokens=tokens, tiles=tiles)


def find_row(
    catalog: Catalog, config: PlanConfig, row: int, progress: Callable[[int], None] = lambda _: None
) -> Cursor:
    """Returns where the window stands that holds a row of the stage, or the last one if there is no such row.

    How many rows windows have is known when they are made, so all before it are made.

    Args:
        progress: called with the number of rows of each window that was passed, and at last of those before the row.
    """
    at = Cursor()
    for at, window in windows(catalog, config, Cursor()):
        if row < at.first_row + len(window):
            progress(row - at.first_row)
            break
        progress(len(window))
    return at


def windows(catalog: Catalog, config: PlanConfig, cursor: Cursor) -> Iterator[tuple[Cursor, Window]]:
    """Yields the windows from the cursor's on, and where each stands; while one is used, the next is being made."""
    apart = catalog.apart()
    with ThreadPoolExecutor(1, thread_name_prefix="plan") as pool:

        def begin(job: tuple[int, int, list[Piece]]) -> tuple[int, int, Future[Window]]:
            epoch, number, pieces = job
            return epoch, number, pool.submit(plan_window, apart, config, pieces, epoch, number)

        first_row = cursor.first_row
        made = map(begin, window_pieces(catalog, config, cursor))
        coming = next(made, None)
        while coming is not None:
            epoch, number, window = coming
            rows = window.result()
            coming = next(made, None)
            yield Cursor(epoch=epoch, window=number, first_row=first_row), rows
            first_row += len(rows)


def window_pieces(catalog: Catalog, config: PlanConfig, cursor: Cursor) -> Iterator[tuple[int, int, list[Piece]]]:
    """Yields epoch, number and pieces of the windows from the cursor's on.

    Raises:
        ValueError: if there is no sample to take, in any epoch.
    """
    summaries = catalog.source_summaries()
    if not any(repeat and summary.num_usable for repeat, summary in zip(config.repeats, summaries, strict=True)):
        found = {
            source.name: f"{summary.num_usable} usable of {summary.num_samples} samples, repeat {repeat}"
            + "".join(f", {count} {reason}" for reason, count in sorted(summary.dropped.items()))
            for source, summary, repeat in zip(catalog.sources, summaries, config.repeats, strict=True)
        }
        raise ValueError(
            f"there is no sample to take: {found}; raise a repeat, repair the data, or raise max_length where they "
            f"are too_long"
        )
    epochs = count(cursor.epoch) if config.num_epochs is None else range(cursor.epoch, config.num_epochs)
    for epoch in epochs:
        first = cursor.window if epoch == cursor.epoch else 0
        for number, pieces in enumerate(epoch_windows(catalog, config, epoch)[first:], first):
            yield epoch, number, pieces
