"""A plan walked through, no sample read: how full its rows are, how alike its steps, what each source gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eagle_train.data.balance import deal
from eagle_train.data.catalog import Catalog
from eagle_train.data.plan import PlanConfig
from eagle_train.data.stream import Step, steps


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The sums of a plan's steps (s sources)."""

    num_steps: int
    num_rows: int
    num_tiles: int
    samples: np.ndarray
    """(s,) int64, samples of each source."""
    tokens: np.ndarray
    """(s,) int64."""
    targets: np.ndarray
    """(s,) int64, supervised tokens."""
    fill: float
    """Tokens over places in rows."""
    worst_fill: float
    """Of the emptiest row."""
    step_costs: np.ndarray
    """(whole steps,) int64, see `CostModel`; a last step with fewer rows is left out, unless it is the only one."""
    imbalance: np.ndarray
    """(whole steps,) costs of the busiest rank over the mean of all ranks."""


def simulate(
    catalog: Catalog,
    config: PlanConfig,
    *,
    num_steps: int | None,
    ranks: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Simulation:
    """Returns what the first `num_steps` steps hold (None: all epochs).

    Args:
        ranks: that the rows of a step are dealt to.
        progress: called with the number of steps just done.
    """
    sources = len(catalog.sources)
    samples, tokens, targets = (np.zeros(sources, dtype=np.int64) for _ in range(3))
    num_rows, num_tiles, num_steps_done, worst_fill = 0, 0, 0, 1.0
    step_costs, imbalance = [], []
    for step in steps(catalog, config, end=num_steps):
        num_rows += len(step.rows)
        num_tiles += step.num_tiles
        samples += step.read
        worst_fill = min(worst_fill, min(count_tokens(catalog, step, tokens, targets)) / config.max_length)
        if len(step.rows) == config.rows_per_step or not step_costs:
            step_costs.append(int(step.costs.sum()))
            imbalance.append(busiest(step.costs, ranks))
        num_steps_done += 1
        progress(1)
    return Simulation(
        num_steps=num_steps_done,
        num_rows=num_rows,
        num_tiles=num_tiles,
        samples=samples,
        tokens=tokens,
        targets=targets,
        fill=int(tokens.sum()) / max(1, num_rows * config.max_length),
        worst_fill=worst_fill,
        step_costs=np.array(step_costs, dtype=np.int64),
        imbalance=np.array(imbalance),
    )


def busiest(costs: np.ndarray, ranks: int) -> float:
    """Returns the costs of the rank with most to do over the mean of all ranks."""
    loads = [sum(int(costs[row]) for row in rows if row >= 0) for rows in deal(costs, ranks)]
    return max(loads) * ranks / sum(loads)


def count_tokens(catalog: Catalog, step: Step, tokens: np.ndarray, targets: np.ndarray) -> list[int]:
    """Adds a step's tokens and targets to those of each source; returns the tokens of each row."""
    numbers = np.concatenate(step.rows)
    shards = np.searchsorted(catalog.starts, numbers, side="right") - 1
    lengths = np.empty(len(numbers), dtype=np.int64)
    for shard in np.unique(shards).tolist():
        here = shards == shard
        rows = numbers[here] - catalog.starts[shard]
        sizes = catalog.sizes(shard)
        lengths[here] = sizes.num_tokens[rows]
        source = catalog.shards[shard].source
        tokens[source] += lengths[here].sum()
        targets[source] += sizes.num_targets[rows].sum(dtype=np.int64)
    starts = np.cumsum([0, *(len(row) for row in step.rows[:-1])])
    return np.add.reduceat(lengths, starts).tolist()
