"""Averaging policies: what a token, a turn and a sample weigh."""

import numpy as np
import pytest

from eagle_train.data.loss_weights import per_sample, per_token, square_root, square_root_per_turn

DIALOGUE = np.array([0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], dtype=bool)  # turns of 4, 1 and 9 tokens


@pytest.mark.parametrize(
    ("policy", "weighs"),
    [(per_token, [4, 1, 9]), (per_sample, [4 / 14, 1 / 14, 9 / 14]), (square_root_per_turn, [2, 1, 3])],
)
def test_turns_weigh_what_the_policy_says(policy, weighs):
    weights = policy(DIALOGUE)
    assert weights.dtype == np.float32 and not weights[~DIALOGUE].any()
    assert [float(weights[a:b].sum()) for a, b in ((1, 5), (7, 8), (9, 18))] == pytest.approx(weighs)


def test_a_sample_weighs_the_root_of_its_tokens():
    assert float(square_root(DIALOGUE).sum()) == pytest.approx(14**0.5)
    assert np.unique(square_root(DIALOGUE)[DIALOGUE]).tolist() == pytest.approx([14**-0.5])


@pytest.mark.parametrize("mask", [[1, 1, 1], [0, 1, 1], [1, 1, 0], [1]])
def test_one_turn_by_itself_weighs_as_the_whole_sample(mask):
    supervised = np.array(mask, dtype=bool)
    assert square_root_per_turn(supervised) == pytest.approx(square_root(supervised))
