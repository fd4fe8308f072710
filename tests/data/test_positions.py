"""Position ids of time, rows and columns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_train.data.positions import multimodal_rotary, sequential

grids = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
parts = st.lists(st.integers(1, 6) | grids, max_size=6)


def laid_out(parts):
    """Returns length, places of visual tokens and grids of texts and pictures one after the other."""
    at, places, found = 0, [], []
    for part in parts:
        count = part if isinstance(part, int) else int(np.prod(part))
        if not isinstance(part, int):
            places += range(at, at + count)
            found.append(part)
        at += count
    return at, np.array(places, np.int64), found


def test_the_example_of_the_docstring():
    ids = multimodal_rotary(*laid_out([2, (1, 2, 2), 1]))
    assert ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 2, 2, 2, 4],
        [0, 1, 2, 2, 3, 3, 4],
        [0, 1, 2, 3, 2, 3, 4],
    ]


@pytest.mark.parametrize(
    ("parts", "delta"),
    [  # the largest position + 1 - the number of tokens, by Qwen's own code
        ([2, (4, 2, 2), 4], -12),
        ([2, (20, 4, 4), 8], -300),
    ],
)
def test_long_videos_go_on_behind_their_last_step(parts, delta):
    length, places, found = laid_out(parts)
    ids = multimodal_rotary(length, places, found)
    assert ids.max(initial=0, where=np.arange(4)[:, None] > 0) + 1 - length == delta
    assert ids[1:, -1].tolist() == [2 + max(found[0]) + parts[-1] - 1] * 3


@given(parts)
def test_no_two_tokens_share_all_positions_and_text_has_all_alike(parts):
    length, places, found = laid_out(parts)
    ids = multimodal_rotary(length, places, found)
    assert ids.shape == (4, length) and ids[0].tolist() == list(range(length))
    assert len({tuple(column) for column in ids[1:].T.tolist()}) == length
    text = np.setdiff1d(np.arange(length), places)
    assert (ids[1:, text] == ids[1, text]).all() and (np.diff(ids[1, text]) > 0).all()
    if not found:
        assert (ids == sequential(length, places, found)).all()


@given(parts.filter(lambda parts: any(not isinstance(part, int) for part in parts)))
def test_every_picture_starts_behind_all_that_was_before_and_spans_its_grid(parts):
    length, places, found = laid_out(parts)
    ids, at = multimodal_rotary(length, places, found), 0
    for grid in found:
        first, count = places[at], int(np.prod(grid))
        own = ids[1:, first : first + count]
        assert own[:, 0].tolist() == [ids[1:, :first].max(initial=-1) + 1] * 3
        assert (own.max(axis=1) - own[:, 0] + 1).tolist() == list(grid)
        at += count


def test_pictures_that_do_not_stand_together_are_refused():
    with pytest.raises(ValueError, match="no 4 places side by side"):
        multimodal_rotary(8, np.array([1, 2, 4, 5]), [(1, 2, 2)])
    with pytest.raises(ValueError, match="2 are left"):
        multimodal_rotary(8, np.array([1, 2]), [(1, 2, 2)])
    with pytest.raises(ValueError, match="0 are left"):
        multimodal_rotary(8, np.arange(4), [(1, 2, 2), (1, 1, 1)])
    with pytest.raises(ValueError, match="have 4 tiles, there are 5 visual tokens"):
        multimodal_rotary(8, np.arange(5), [(1, 2, 2)])
