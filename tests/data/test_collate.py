"""A row: samples laid end to end and kept apart."""

from dataclasses import replace

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
    assert row.pixels[:, 0, 0, 0].tolist() == [1, 2, 2] and row.num_images == 3
    assert row.pixels.shape == (3, 3, 4, 4) and row.grids == ()
    assert row.keys == ("a", "b", "c") and row.sources == ("s", "s", "s") and row.segment_lengths == (5, 3, 6)
    ids = [*range(100, 105), *range(100, 103), *range(100, 106)]
    assert row.input_ids.tolist() == ids
    assert row.labels.tolist() == [id if id % 2 == 0 else IGNORE_INDEX for id in ids]
    assert row.loss_weights.tolist() == [float(id % 2 == 0) for id in ids]


def test_tiles_that_lie_end_to_end_are_not_copied_and_grids_follow_each_other():
    pixels = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1, 1).expand(3, 3, 2, 4, 4).contiguous()
    one, two = replace(sample("a", 5, 1), grids=((1, 1, 1),)), replace(sample("b", 6, 2), grids=((2, 1, 1),))
    row = pack([one, sample("c", 2, 0), two], [], filler_id=0, tile_size=4, tile_depth=2, pixels=pixels)
    assert row.pixels is pixels and row.grids == ((1, 1, 1), (2, 1, 1))


def test_a_row_without_images_carries_one_placeholder_tile():
    row = pack([sample("a", 5, 0)], [], filler_id=0, tile_size=4)
    assert row.pixels.shape == (1, 3, 4, 4) and row.num_images == 0 and len(row.image_positions) == 0
    assert not row.pixels.any() and row.grids == ()
    deep = pack([sample("a", 5, 0)], [], filler_id=0, tile_size=4, tile_depth=2, pixels=torch.empty(0, 3, 2, 4, 4))
    assert deep.pixels.shape == (1, 3, 2, 4, 4) and deep.grids == ((1, 1, 1),)


def test_an_empty_row_weighs_nothing_and_keeps_its_errors():
    error = SampleError("s/x", "unreadable_image", "broken")
    row = pack([], [("s", error)], filler_id=7, tile_size=4)
    assert row.input_ids.tolist() == [7] and row.loss_weights.tolist() == [0] and row.num_tokens == row.num_targets == 0
    assert row.labels.tolist() == [IGNORE_INDEX] and row.position_ids.tolist() == [0]
    assert row.cu_seqlens.tolist() == [0, 1] and row.keys == () and row.errors == (("s", error),)
