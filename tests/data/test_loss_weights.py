"""Averaging policies: what a token, a turn and a sample weigh."""

import pytest
import torch

from eagle_train.data.loss_weights import per_sample, per_token, square_root, square_root_per_turn

DIALOGUE = torch.tensor([0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]).bool()  # turns of 4, 1 and 9 tokens


@pytest.mark.parametrize(
    ("policy", "weighs"),
    [(per_token, [4, 1, 9]), (per_sample, [4 / 14, 1 / 14, 9 / 14]), (square_root_per_turn, [2, 1, 3])],
)
def test_turns_weigh_what_the_policy_says(policy, weighs):
    weights = policy(DIALOGUE)
    assert weights.dtype == torch.float32 and not weights[~DIALOGUE].any()
    assert [float(weights[a:b].sum()) for a, b in ((1, 5), (7, 8), (9, 18))] == pytest.approx(weighs)


def test_a_sample_weighs_the_root_of_its_tokens():
    assert float(square_root(DIALOGUE).sum()) == pytest.approx(14**0.5)
    assert square_root(DIALOGUE)[DIALOGUE].unique().tolist() == pytest.approx([14**-0.5])


@pytest.mark.parametrize("mask", [[1, 1, 1], [0, 1, 1], [1, 1, 0], [1]])
def test_one_turn_by_itself_weighs_as_the_whole_sample(mask):
    supervised = torch.tensor(mask).bool()
    assert torch.allclose(square_root_per_turn(supervised), square_root(supervised))
