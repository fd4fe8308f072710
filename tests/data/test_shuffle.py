"""Shuffling: the same for ever, another order under other keys."""

import numpy as np

from eagle_train.data.shuffle import shuffled, splitmix64

PINNED = [637557492691185812, 4224912144409887360, 10434316095484257304]


def test_the_shuffle_is_fixed_for_ever():
    # Published SplitMix64 is used per key; these values pin our chaining of keys.
    assert splitmix64(np.arange(3), 1, 2, 3).tolist() == PINNED
    assert sorted(shuffled(np.arange(50), 1, 2, 3, 0).tolist()) == list(range(50))
    assert shuffled(np.arange(50), 1, 2, 3, 0).tolist() != shuffled(np.arange(50), 1, 2, 4, 0).tolist()


def test_rows_of_a_matrix_stay_whole():
    steps = np.arange(60).reshape(20, 3)
    mixed = shuffled(steps, 7)
    assert mixed.tolist() != steps.tolist() and sorted(mixed.tolist()) == steps.tolist()


def test_the_largest_key_is_allowed():
    assert splitmix64(np.arange(2), 2**64 - 1).dtype == np.uint64
