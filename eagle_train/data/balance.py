"""Balance: what a sample costs, which rows share a step, and which rank runs which of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eagle_train.data.shuffle import shuffled

# Streams of random numbers of `order_rows`, one per use.
STEPS, BORDER, STRATA = range(3)


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """What a sample costs, in FLOPs of forward and backward.

    Args:
        per_token: of the LLM without attention scores; 6 for each of its parameters, as usual.
        per_target: of what only tokens with a label need, the LM head for one.
        per_token_squared: of the attention scores, times the square of the sample's tokens; for a causal LLM
            of L layers and H attention channels, 6 * L * H.
        per_tile: of the vision encoders and the projector.
        per_tile_pair: of the attention scores of an encoder of native resolution, for every two tiles of one picture
            or step in time.

    Raises:
        ValueError: if a number is negative or all are zero.
    """

    per_token: float
    per_token_squared: float = 0.0
    per_target: float = 0.0
    per_tile: float = 0.0
    per_tile_pair: float = 0.0

    def __post_init__(self) -> None:
        parts = (self.per_token, self.per_token_squared, self.per_target, self.per_tile, self.per_tile_pair)
        if min(parts) < 0 or max(parts) == 0:
            raise ValueError(
                f"costs per token, squared token, label, tile and pair of tiles are {parts}; they must not be "
                f"negative, nor all zero"
            )

    def sample_costs(
        self,
        lengths: np.ndarray,
        num_tiles: np.ndarray,
        num_tile_pairs: np.ndarray | int = 0,
        num_targets: np.ndarray | int = 0,
    ) -> np.ndarray:
        """Returns (n,) int64 costs in thousands of FLOPs; whole, so that sums are the same in any order.

        Args:
            lengths: (n,) tokens of each sample.
            num_tiles: (n,) tiles of each sample.
            num_tile_pairs: (n,) pairs of tiles of one grid, of each sample.
            num_targets: (n,) tokens with a label of each sample.
        """
        tokens = lengths.astype(np.float64)
        flops = self.per_token * tokens + self.per_token_squared * tokens * tokens
        flops += self.per_target * num_targets
        flops += self.per_tile * num_tiles + self.per_tile_pair * num_tile_pairs
        return np.rint(flops / 1000).astype(np.int64)


def order_rows(costs: np.ndarray, rows_per_step: int, first_row: int, seed: int, *, alike: float = 0.01) -> np.ndarray:
    """Returns an order of a window's rows in which the rows of every step cost about the same.

    Steps take `rows_per_step` rows each, counted from the stage's first row. Rows that cost about the same
    share a step, and the steps come in random order. A step that began in the window before is completed, and
    the last one begun, with the rows nearest the median, which are those most like the rows of other windows.

    Args:
        costs: (m,) of each row.
        rows_per_step: rows of an optimizer step.
        first_row: rows of the stage's earlier windows together.
        seed: of the random order.
        alike: steps whose costs lie within this share of each other have their rows mixed, so that steps are
            as random as balance allows.
    """
    head = min(-first_row % rows_per_step, len(costs))
    tail = (len(costs) - head) % rows_per_step
    ranked = np.argsort(costs, kind="stable")
    start = (len(costs) - head - tail) // 2
    border = shuffled(ranked[start : start + head + tail], seed, BORDER)
    steps = np.concatenate([ranked[:start], ranked[start + head + tail :]]).reshape(-1, rows_per_step)
    first = 0
    for number in range(len(steps) + 1):
        # A stratum ends before the first step whose costliest row differs too much from the stratum's cheapest.
        if number == len(steps) or costs[steps[number, -1]] > (1 + alike) * costs[steps[first, 0]]:
            if number - first > 1:
                steps[first:number] = shuffled(steps[first:number].ravel(), seed, STRATA, first).reshape(
                    -1, rows_per_step
                )
            first = number
    return np.concatenate([border[:head], shuffled(steps, seed, STEPS).ravel(), border[head:]])


def deal(costs: np.ndarray, world_size: int) -> list[list[int]]:
    """Returns each rank's rows of a step, one per micro-batch; -1 is an empty row of weight zero.

    Every rank gets ceil(r / world_size) rows. The costliest rows run in the first micro-batch, the next in the
    second and so on, so that ranks rarely wait for each other within a micro-batch; and the costliest of a
    micro-batch go to the ranks with the least so far, so that they rarely wait at the end of the step.

    Args:
        costs: (r,) of the step's rows.
        world_size: number of ranks.
    """
    ranked = np.argsort(-costs, kind="stable")
    loads = np.zeros(world_size, dtype=costs.dtype)
    micro_batches = []
    for first in range(0, len(costs), world_size):
        rows = ranked[first : first + world_size]
        ranks = np.argsort(loads, kind="stable")[: len(rows)]
        loads[ranks] += costs[rows]
        micro_batch = np.full(world_size, -1, dtype=np.int64)
        micro_batch[ranks] = rows
        micro_batches.append(micro_batch.tolist())
    return (
        [list(rows) for rows in zip(*micro_batches, strict=True)] if micro_batches else [[] for _ in range(world_size)]
    )
