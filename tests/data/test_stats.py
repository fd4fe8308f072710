"""Distributions are exact whatever they are summed up from; a simulated plan agrees with its steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_train.data.balance import deal
from eagle_train.data.simulate import simulate
from eagle_train.data.stats import PERCENTILES, Distribution
from eagle_train.data.stream import steps
from tests.catalogs import made_up_catalog, plan_config

NUMBERS = st.lists(st.integers(0, 5000), min_size=1, max_size=60)


@given(NUMBERS, NUMBERS)
def test_a_sum_of_distributions_is_the_distribution_of_all_numbers(one, other):
    both = np.array(one + other)
    found = Distribution.of(one).plus(Distribution.of(other))
    assert found.describe() == Distribution.of(both).describe()
    told = found.describe()
    assert (told["count"], told["sum"], told["min"], told["max"]) == (len(both), both.sum(), both.min(), both.max())
    for percent in PERCENTILES:
        assert told[f"p{percent}"] == np.quantile(both, percent / 100, method="inverted_cdf")
    bins = found.histogram()
    assert sum(count for _, _, count in bins) == len(both)
    for first, last, count in bins:
        assert count == ((both >= first) & (both <= last)).sum()


def test_nothing_has_no_percentiles():
    assert Distribution.of([]).describe() == {"count": 0} and Distribution.of([]).histogram() == []


@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_a_simulation_counts_what_the_steps_hold(tmp_path, ranks):
    catalog = made_up_catalog(tmp_path, repeats=(1.5, 0.5))
    config = plan_config(catalog, num_epochs=2)
    found = simulate(catalog, config, num_steps=None, ranks=ranks)
    told = list(steps(catalog, config))
    assert found.num_steps == len(told) > 10
    assert found.num_rows == sum(len(step.rows) for step in told)
    assert found.tokens.sum() == sum(step.num_tokens for step in told) and found.num_tiles > 0
    assert found.samples.tolist() == sum(step.read for step in told).tolist() == [900, 120]
    assert found.fill == pytest.approx(found.tokens.sum() / (found.num_rows * 512))
    by_row = [sum(lengths_of(catalog, row)) for step in told for row in step.rows]
    assert found.worst_fill == min(by_row) / 512
    whole = [step for step in told if len(step.rows) == 4]
    assert found.step_costs.tolist() == [int(step.costs.sum()) for step in whole]
    loads = [
        [sum(int(step.costs[row]) for row in rows if row >= 0) for rows in deal(step.costs, ranks)] for step in whole
    ]
    assert found.imbalance == pytest.approx([max(load) / np.mean(load) for load in loads])
    assert (found.imbalance == 1).all() if ranks == 1 else (found.imbalance > 1).any()


def lengths_of(catalog, row):
    places = [catalog.locate(number) for number in row.tolist()]
    return [int(catalog.sizes(shard).num_tokens[index]) for shard, index in places]
