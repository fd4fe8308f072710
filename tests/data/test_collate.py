"""A row: samples laid end to end and kept apart."""

import torch

from eagle_train.data.collate import pack
from eagle_train.types import IGNORE_INDEX, EncodedSample, SampleError


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
    assert row.max_seqlen == 6 and row.num_tokens == 14 and row.num_targets == 8
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
    assert row.input_ids.tolist() == [7] and row.loss_weights.sum() == 0 and row.num_tokens == row.num_targets == 0
    assert row.cu_seqlens.tolist() == [0, 1] and row.keys == () and row.errors == (("s", error),)
