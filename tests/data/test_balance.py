"""Balance: rows of a step alike, steps in random order, ranks alike, nothing lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_train.data.balance import CostModel, deal, order_rows

PINNED_ORDER = [4, 0, 1, 2, 3, 7, 8, 9, 10, 11, 5, 6]
PROPERTY = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def random_costs(count, seed=0):
    """Whole costs with a long tail."""
    return np.exp(np.random.default_rng(seed).normal(10, 0.5, count)).astype(np.int64)


def steps_of(costs, rows_per_step, seed, windows):
    """Orders windows of `costs` one after another and returns the costs of all whole steps."""
    ordered, first_row = [], 0
    for window in np.array_split(costs, windows):
        ordered.append(window[order_rows(window, rows_per_step, first_row, seed)])
        first_row += len(window)
    ordered = np.concatenate(ordered)
    return ordered[: len(ordered) // rows_per_step * rows_per_step].reshape(-1, rows_per_step)


def imbalance(steps):
    """Returns the costliest row over the mean, by step."""
    return steps.max(axis=1) / steps.mean(axis=1)


def test_a_sample_costs_its_tokens_their_square_its_tiles_and_its_labels():
    model = CostModel(per_token=1e6, per_token_squared=1e3, per_target=2e6, per_tile=5e9, per_tile_pair=1e4)
    lengths, tiles = np.array([10, 2000], dtype=np.int32), np.array([0, 3])
    costs = model.sample_costs(lengths, tiles)
    assert costs.dtype == np.int64
    assert costs.tolist() == [10_000 + 100, 2_000_000 + 4_000_000 + 15_000_000]
    more = model.sample_costs(lengths, tiles, np.array([0, 9]), np.array([4, 1000])) - costs
    assert more.tolist() == [8_000, 90 + 2_000_000]


def test_costs_of_the_largest_runs_do_not_overflow():
    model = CostModel(per_token=6 * 72e9, per_token_squared=6 * 80 * 8192, per_tile=2e13)
    costs = model.sample_costs(np.full(1000, 131_072), np.full(1000, 512))
    assert costs.sum() > 1000 * 131_072 * 432_000_000
    assert (costs > 0).all()


@pytest.mark.parametrize("parts", [(-1.0, 0.0, 0.0), (1.0, -2.0, 0.0), (1.0, 0.0, -1.0), (0.0, 0.0, 0.0)])
def test_a_cost_model_without_sense_is_refused(parts):
    with pytest.raises(ValueError, match="must not be negative, nor all zero"):
        CostModel(per_token=parts[0], per_target=parts[1], per_tile=parts[2])


@PROPERTY
@given(
    costs=st.lists(st.integers(1, 10**9), max_size=100),
    rows_per_step=st.integers(1, 40),
    first_row=st.integers(0, 1000),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_row_of_a_window_comes_once(costs, rows_per_step, first_row, seed):
    order = order_rows(np.array(costs, dtype=np.int64), rows_per_step, first_row, seed)
    assert sorted(order.tolist()) == list(range(len(costs)))


def test_rows_of_a_step_are_alike():
    costs = random_costs(64 * 100)
    ratios = imbalance(steps_of(costs, 64, 0, windows=1))
    assert ratios.mean() < 1.02 and np.median(ratios) < 1.01
    assert imbalance(costs.reshape(-1, 64)).mean() > 2, "so they are not by themselves"


def test_steps_across_the_borders_of_windows_are_alike_too():
    costs = random_costs(26_000)
    steps = steps_of(costs, 64, 0, windows=7)
    ends = np.cumsum([len(window) for window in np.array_split(costs, 7)])[:-1]
    assert (ends % 64 > 0).all(), "every border lies within a step"
    assert imbalance(steps[ends // 64]).max() < 1.03
    assert np.median(imbalance(steps)) < 1.02


def test_steps_come_in_random_order_given_by_the_seed():
    costs = random_costs(64 * 50)
    one, same, other = (steps_of(costs, 64, seed, windows=1).mean(axis=1) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.array_equal(np.sort(one), np.sort(other)), "the same steps"
    ranks = np.argsort(np.argsort(one))
    assert abs(np.corrcoef(ranks, np.arange(50))[0, 1]) < 0.4


def test_the_order_is_fixed_for_ever():
    # Resuming an old run needs the steps of then.
    assert order_rows(np.arange(12) ** 2, 3, 2, 5).tolist() == PINNED_ORDER


def test_rows_that_cost_about_the_same_are_mixed_freely():
    costs = 1_000_000 + np.arange(640)  # all within 0.1 %
    order = order_rows(costs, 64, 0, 0)
    spans = [np.ptp(order[first : first + 64]) for first in range(0, 640, 64)]
    assert min(spans) > 500, "every step has rows from everywhere"
    apart = order_rows(costs * costs * costs, 64, 0, 0, alike=0.0)
    assert max(np.ptp(apart[first : first + 64]) for first in range(0, 640, 64)) == 63


@PROPERTY
@given(costs=st.lists(st.integers(1, 10**9), max_size=80), world_size=st.integers(1, 20))
def test_every_rank_runs_as_many_rows_and_none_is_lost(costs, world_size):
    ranks = deal(np.array(costs, dtype=np.int64), world_size)
    assert len(ranks) == world_size
    assert {len(rows) for rows in ranks} == {-(-len(costs) // world_size)}
    assert sorted(row for rows in ranks for row in rows if row >= 0) == list(range(len(costs)))
    empty = [micro for rows in ranks for micro, row in enumerate(rows) if row < 0]
    assert all(micro == len(ranks[0]) - 1 for micro in empty), "empty rows come last"


def test_ranks_are_alike_within_each_micro_batch_and_at_the_end():
    costs = random_costs(256)
    dealt = costs[np.array(deal(costs, 8))]
    assert dealt.shape == (8, 32)
    micro_batches = dealt.max(axis=0) / dealt.mean(axis=0)
    assert np.median(micro_batches) < 1.05
    totals = dealt.sum(axis=1)
    assert totals.max() / totals.mean() < 1.03
    assert costs.reshape(8, 32).sum(axis=1).max() / totals.mean() > 1.03, "so they are not by themselves"


def test_the_ranks_short_of_a_row_are_those_with_the_most():
    assert deal(np.array([9, 8, 7, 1, 1]), 3) == [[0, -1], [1, 4], [2, 3]]
