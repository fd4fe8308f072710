"""Packing: nothing lost, nothing doubled, rows full, samples kept apart."""

import numpy as np
import pytest
import torch

from eagle_train.data.packing import best_fit_decreasing, pack
from eagle_train.types import IGNORE_INDEX, EncodedSample, SampleError


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_is_in_exactly_one_row_and_no_row_overflows(seed):
    lengths = np.random.default_rng(seed).integers(1, 1025, size=500)
    rows = best_fit_decreasing(lengths, 1024)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 1024
    assert all(row == sorted(row) for row in rows)


def test_fill_is_near_perfect_on_short_samples():
    lengths = np.random.default_rng(0).integers(60, 400, size=5000)
    rows = best_fit_decreasing(lengths, 4096)
    assert lengths.sum() / (len(rows) * 4096) > 0.995


def test_best_fit_takes_the_fullest_row_that_holds_the_sample():
    # 6 and 5 open rows with 4 and 5 left; 4 fits both and must go to the row with 4 left.
    assert best_fit_decreasing(np.array([6, 5, 4]), 10) == [[0, 2], [1]]


def test_no_samples_make_no_rows():
    assert best_fit_decreasing(np.array([], dtype=int), 10) == []


def sample(key, length, tiles, source="s"):
    ids = torch.arange(length) + 100
    return EncodedSample(
        key=key,
        source=source,
        input_ids=ids,
        labels=torch.where(ids % 2 == 0, ids, IGNORE_INDEX),
        loss_weights=(ids % 2 == 0).float(),
        image_positions=torch.arange(tiles * 2),
        pixels=torch.full((tiles, 3, 4, 4), tiles, dtype=torch.uint8),
    )


def test_a_row_restarts_positions_and_moves_image_positions():
    row = pack([sample("a", 5, 1), sample("b", 3, 0), sample("c", 6, 2)], [], filler_id=0, tile_size=4)
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert row.cu_seqlens.tolist() == [0, 5, 8, 14]
    assert row.max_seqlen == 6 and row.num_tokens == 14
    assert row.image_positions.tolist() == [0, 1, 8, 9, 10, 11]
    assert row.pixels.shape == (3, 3, 4, 4) and row.num_images == 3
    assert row.keys == ("a", "b", "c")
    assert len(row.labels) == len(row.loss_weights) == len(row.input_ids) == 14


def test_a_row_without_images_carries_one_placeholder_tile():
    row = pack([sample("a", 5, 0)], [], filler_id=0, tile_size=4)
    assert row.pixels.shape == (1, 3, 4, 4) and row.num_images == 0 and len(row.image_positions) == 0


def test_an_empty_row_weighs_nothing_and_keeps_its_errors():
    error = SampleError("s/x", "unreadable_image", "broken")
    row = pack([], [("s", error)], filler_id=7, tile_size=4)
    assert row.input_ids.tolist() == [7] and row.loss_weights.sum() == 0 and row.num_tokens == 0
    assert row.cu_seqlens.tolist() == [0, 1] and row.keys == () and row.errors == (("s", error),)
