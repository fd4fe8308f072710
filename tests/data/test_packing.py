"""Packing: nothing lost, nothing doubled, rows full."""

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_train.data.completion import complete_rows
from eagle_train.data.packing import pack_rows, place, spread_part
from eagle_train.data.shuffle import splitmix64

PINNED_PACKINGS = {16_384: 12548238793527492392, 4096: 10870936633382595274}
"""Of many samples to a row, and of few."""


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Returns rows of indices into `lengths`, each row's sum at most `capacity`.

    The longest sample first, each into the fullest row that still holds it. Ties go to the earlier
    sample and the earlier row, so the result depends on the order of `lengths` alone. Within a row,
    samples keep their order in `lengths`.

    Args:
        lengths: (n,) tokens per sample, each in 1..capacity.
        capacity: tokens of a row.

    Source: D. S. Johnson, Near-optimal bin packing algorithms, 1973.
    """
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            left, row = open_rows.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if left > length:
            insort(open_rows, (left - length, row))
    return [sorted(row) for row in rows]


def mix(count, capacity, seed=0):
    """Lengths of texts and of images with texts, each shorter than half a row, and costs with attention and tiles."""
    rng = np.random.default_rng(seed)
    tiles = rng.choice([0, 0, 1, 3, 7, 13], count)
    texts = np.clip(np.exp(rng.normal(5, 0.8, count)), 20, 3000).astype(np.int64)
    lengths = np.minimum(texts + tiles * 256, capacity // 2 - 1)
    return lengths, lengths * 50_000 + lengths**2 // 2 + tiles * 3_000_000


def checked(lengths, costs, capacity):
    """Packs, checks that every sample lies in one row and none overflows; returns tokens and costs of the rows."""
    samples, offsets = pack_rows(lengths, costs, capacity)
    assert samples.dtype == offsets.dtype == np.int64
    assert sorted(samples.tolist()) == list(range(len(lengths)))
    assert offsets[0] == 0 and offsets[-1] == len(lengths) and (np.diff(offsets) > 0).all()
    rows = np.split(samples, offsets[1:-1])
    assert all((np.diff(row) > 0).all() for row in rows), "samples keep their order within a row"
    tokens = np.array([lengths[row].sum() for row in rows])
    assert tokens.max() <= capacity
    return tokens, np.array([costs[row].sum() for row in rows])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 100) | st.sampled_from([1, 49, 50, 51, 99, 100]), min_size=1, max_size=300),
    scale=st.sampled_from([0.0, 1.0, 1e15]),
    seed=st.integers(0, 1000),
)
def test_rows_hold_every_sample_once_whatever_the_lengths_and_costs(lengths, scale, seed):
    costs = np.random.default_rng(seed).random(len(lengths)) * scale
    tokens, _ = checked(np.array(lengths), costs, 100)
    assert len(tokens) <= 1 or np.sort(tokens)[:2].sum() > 100, "two rows never fit into one"


@pytest.mark.parametrize("capacity", [16_384, 36_864, 131_072])
def test_rows_are_full_and_alike_in_cost_and_number_of_samples(capacity):
    lengths, costs = mix(int(100 * capacity / 900), capacity)
    tokens, row_costs = checked(lengths, costs, capacity)
    assert tokens.sum() / (len(tokens) * capacity) > 0.99, "of 100 rows, one is not full"
    full = row_costs[tokens > 0.9 * capacity]
    assert len(full) >= len(tokens) - 1
    _, offsets = pack_rows(lengths, costs, capacity)
    counts = np.diff(offsets)[tokens > 0.9 * capacity]
    # As a yardstick: best fit alone puts long samples with long samples.
    alone = best_fit_decreasing(lengths, capacity)
    alone_costs, alone_counts = np.array([costs[row].sum() for row in alone]), np.array([len(row) for row in alone])
    for ours, theirs in ((full, alone_costs), (counts, alone_counts)):
        assert ours.std() / ours.mean() < 0.5 * theirs.std() / theirs.mean()
    assert full.std() / full.mean() < 0.02


def test_where_spreading_would_cost_rows_there_is_none():
    # Images of 1100 to 1500 tokens, four to a row of 6144, and texts: spread evenly, many rows end with room for none.
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1100, 1500, 4000), rng.integers(30, 1000, 1500)])
    tokens, _ = checked(lengths, lengths, 6144)
    sizes, fewest = np.sort(lengths)[::-1], -(-int(lengths.sum()) // 6144)
    part = spread_part(sizes, 2.0, fewest)
    _, spread_rows = place(sizes, sizes, 6144, fewest, part)
    assert len(tokens) <= len(best_fit_decreasing(lengths, 6144)) < spread_rows


def images_and_texts(count, tile, tiles):
    """Returns lengths of images with so many tiles each, and of a quarter as many texts, in rows of 4096."""
    rng = np.random.default_rng(0)
    texts = np.clip(np.exp(rng.normal(5.3, 0.6, count)), 20, 700).astype(np.int64)
    alone = np.clip(np.exp(rng.normal(6, 0.9, count // 4)), 20, 4096).astype(np.int64)
    return np.concatenate([np.minimum(texts + tile * rng.choice(tiles, count), 4096), alone])


# Fewest rows that any packing can have, by scripts/bench/packers.py: more than half of what best fit adds is saved.
@pytest.mark.parametrize(
    ("tile", "tiles", "bound"), [(1024, [1], 4207), (256, [13, 13, 13, 13, 9, 8, 7, 6, 5, 4], 8401)]
)
def test_few_samples_to_a_row_fill_rows_nearly_as_well_as_can_be(tile, tiles, bound):
    lengths = images_and_texts(12_000, tile, tiles)
    tokens, _ = checked(lengths, lengths, 4096)
    assert len(tokens) - bound < (len(best_fit_decreasing(lengths, 4096)) - bound) / 2


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(10, 100), min_size=1, max_size=100))
def test_there_are_never_more_rows_than_best_fit_makes_of_few_samples_to_a_row(lengths):
    tokens, _ = checked(np.array(lengths), np.ones(len(lengths)), 100)
    assert sum(lengths) * 8 <= 100 * len(lengths) or len(tokens) <= len(best_fit_decreasing(np.array(lengths), 100))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(1, 60), max_size=80), enough=st.sampled_from([0, 3, 60]))
def test_completed_rows_hold_every_sample_once_and_none_has_room_for_a_later_one(lengths, enough):
    lengths = -np.sort(-np.array(lengths, dtype=np.int64))
    places, room = complete_rows(lengths, 60, enough)
    assert sorted(set(places)) == list(range(len(room))) and len(places) == len(lengths)
    assert (60 - np.bincount(places, lengths, len(room))).tolist() == room and min(room, default=0) >= 0
    assert all(lengths[k] > room[row] for row in range(len(room)) for k, place in enumerate(places) if place > row)


@pytest.mark.parametrize(
    ("lengths", "enough", "rows"),
    [
        ([60, 40, 30, 10], 0, [[60, 40], [30, 10]]),  # one fills the row
        ([50, 48, 30, 20], 2, [[50, 48], [30, 20]]),  # or nearly
        ([50, 48, 30, 20], 1, [[50, 30, 20], [48]]),  # if not, two do
        ([50, 40, 30, 20, 10], 0, [[50, 30, 20], [40, 10]]),  # the pair that is most alike: not 40 and 10
        ([50, 26, 26, 25], 0, [[50, 26], [26, 25]]),  # 25 is there once, so it is no pair; 26 and 26 are too long
        ([50, 30, 25, 25], 0, [[50, 25, 25], [30]]),  # 25 is there twice
        ([50, 30, 17], 0, [[50, 30, 17]]),  # a pair may miss 3
    ],
)
def test_a_row_is_completed_by_what_fills_it(lengths, enough, rows):
    places, _ = complete_rows(np.array(lengths), 100, enough)
    assert [[length for length, row in zip(lengths, places, strict=True) if row == k] for k in range(len(rows))] == rows


def test_long_samples_do_not_share_a_row_while_there_are_rows_for_all():
    lengths = np.array([400] * 10 + [10] * 600)
    samples, offsets = pack_rows(lengths, lengths, 1000)
    assert len(offsets) - 1 == 10
    assert [(lengths[row] == 400).sum() for row in np.split(samples, offsets[1:-1])] == [1] * 10


def test_what_is_spread_knows_the_room_that_the_longest_samples_left():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(500, 900, 41), rng.integers(10, 60, 3000)])
    sizes, fewest = np.sort(lengths)[::-1], -(-int(lengths.sum()) // 1000)
    assert 0 < spread_part(sizes, 2.0, fewest)[0] <= 41, "the longest are placed before anything is spread"
    tokens, _ = checked(lengths, lengths, 1000)
    assert len(tokens) == fewest and tokens.min() > 900


def test_many_alike_samples_are_spread_no_further_than_costs_no_rows():
    # Ten or so to a row: spread over all rows, hardly any row has room for one more in the end.
    for seed in range(3):
        lengths = np.random.default_rng(seed).integers(33, 50, 700)
        sizes, fewest = np.sort(lengths)[::-1], -(-int(lengths.sum()) // 406)
        _, offsets = pack_rows(lengths, lengths, 406)
        _, spread_rows = place(sizes, sizes, 406, fewest, spread_part(sizes, 2.0, fewest))
        assert len(offsets) - 1 <= len(best_fit_decreasing(lengths, 406)) and len(offsets) - 1 < spread_rows


def test_costs_beyond_tokens_are_spread_too():
    lengths = np.array([100] * 400)
    costs = np.array([1, 0, 0, 0] * 100) * 1e12
    _, row_costs = checked(lengths, costs, 1000)
    assert len(row_costs) == 40
    assert row_costs.max() <= 4e12, "100 costly samples in 40 rows: 2 or 3 each, 4 where best fit ends the rows"


@pytest.mark.parametrize(
    ("lengths", "rows"), [([7], 1), ([10] * 5, 5), ([6] * 5, 5), ([5] * 5, 3), ([1] * 100, 10), ([9, 8, 7, 3, 2, 1], 3)]
)
def test_small_cases_take_as_few_rows_as_can_be(lengths, rows):
    tokens, _ = checked(np.array(lengths), np.ones(len(lengths)), 10)
    assert len(tokens) == rows


def test_an_empty_window_has_no_rows():
    samples, offsets = pack_rows(np.array([], dtype=int), np.array([]), 10)
    assert len(samples) == 0 and offsets.tolist() == [0]


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0]])
def test_a_sample_that_fits_no_row_is_refused(lengths):
    with pytest.raises(ValueError, match=rf"samples have {min(lengths)} to {max(lengths)} tokens, a row has 10"):
        pack_rows(np.array(lengths), np.ones(2), 10)


@pytest.mark.parametrize("capacity", PINNED_PACKINGS)
def test_the_packing_is_fixed_for_ever_and_independent_of_types(capacity):
    # Resuming an old run needs the rows of then: a change here changes plans and so asks for another PLAN_VERSION.
    numbers = np.arange(2000)
    lengths = (splitmix64(numbers, 1) % 3000 + 20).astype(np.int64)
    costs = lengths * 1000 + (splitmix64(numbers, 2) % 10**6).astype(np.int64)
    one = pack_rows(lengths, costs, capacity)
    two = pack_rows(lengths.astype(np.int32), costs.astype(np.float64), capacity)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    places = np.repeat(np.arange(len(one[1]) - 1), np.diff(one[1]))
    assert int((splitmix64(one[0]) * (places.astype(np.uint64) + np.uint64(1))).sum()) == PINNED_PACKINGS[capacity]
