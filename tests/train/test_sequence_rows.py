"""A row cut for a group of ranks: nothing lost, nothing counted twice."""

from itertools import pairwise

import pytest
import torch

from eagle_train.data.ledger import Ledger, LedgerShard
from eagle_train.train.sequence.attention import head_shares
from eagle_train.train.sequence.group import SequenceGroup
from eagle_train.train.sequence.rows import RowGroups, even_bounds, overlaps, own_part
from eagle_train.train.sequence.spread import check_group
from eagle_train.train.source_losses import sums_by_source
from eagle_train.types import IGNORE_INDEX, RowPart, SampleError
from tests.toys import booked, grown, tiny_model, tiny_row, tiny_sample

SAMPLES = [
    tiny_sample(1, tiles=1, source="a"),
    tiny_sample(2, tiles=0, text=20, source="b"),
    tiny_sample(3, tiles=2, source="a"),
]
TENSORS = ("input_ids", "labels", "loss_weights", "position_ids")


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES[1:2], SAMPLES[:1]])
def test_the_parts_of_a_row_are_the_row(samples, size):
    row = booked(tiny_row(samples))
    parts = [own_part(row, index, size) for index in range(size)]
    for name in TENSORS:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(row, name)), name
    lengths = [len(part.input_ids) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    positions = [part.image_positions + part.part.begin for part in parts]
    assert torch.equal(torch.cat(positions), row.image_positions)
    assert all(0 <= place < len(part.input_ids) for part in parts for place in part.image_positions.tolist())
    seen = [part.pixels for part in parts if part.num_images]
    assert sum(part.num_images for part in parts) == row.num_images
    assert row.num_images == 0 or torch.equal(torch.cat(seen), row.pixels)
    assert all(len(part.pixels) == max(part.num_images, 1) for part in parts)
    assert sum(part.num_tokens for part in parts) == row.num_tokens
    assert sum(part.num_targets for part in parts) == row.num_targets == int((row.labels >= 0).sum())
    assert all(part.segment_lengths == row.segment_lengths and part.keys == row.keys for part in parts)
    assert [part.part.num_made for part in parts] == [4 * part.num_images for part in parts]


def test_a_row_of_fewer_tokens_than_ranks_gets_tokens_that_weigh_nothing():
    row = booked(tiny_row([]))
    parts = [own_part(row, index, 4) for index in range(4)]
    assert [len(part.input_ids) for part in parts] == [1] * 4
    assert [part.num_tokens for part in parts] == [0] * 4
    assert all(part.segment_lengths == (1, 3) and part.cu_seqlens.tolist() == [0, 1, 4] for part in parts)
    assert all(part.max_seqlen == 3 and part.loss_weights.tolist() == [0] for part in parts)
    assert [part.labels.tolist() for part in parts] == [[IGNORE_INDEX]] * 4
    assert torch.cat([part.position_ids for part in parts]).tolist() == [0, 0, 1, 2]


def test_position_ids_of_several_kinds_are_cut_along_the_row():
    row = tiny_row(SAMPLES)
    row = grown(row, position_ids=row.position_ids.expand(4, -1) * torch.arange(1, 5)[:, None])
    parts = [own_part(row, index, 2) for index in range(2)]
    assert torch.equal(torch.cat([part.position_ids for part in parts], dim=-1), row.position_ids)
    short = grown(tiny_row([]), position_ids=torch.zeros(4, 1, dtype=torch.int64))
    assert own_part(short, 1, 2).position_ids.shape == (4, 1)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_sums_by_source_of_parts_add_up_to_those_of_the_row(size):
    row = booked(tiny_row(SAMPLES))
    row = grown(row, loss_weights=torch.rand(len(row.input_ids)) + 0.5)  # those at the ends of samples count too
    losses = torch.rand(len(row.input_ids)) * row.loss_weights
    expected = sums_by_source(row, losses, ["a", "b", "c"])
    of = [range(*bounds) for bounds in pairwise(row.cu_seqlens.tolist())]
    a, b = [*of[0], *of[2]], [*of[1]]
    sums = [[float(each[places].double().sum()) for each in (losses, row.loss_weights)] for places in (a, b)]
    assert torch.allclose(expected, torch.tensor([*sums, [0, 0]], dtype=torch.float64)) and min(map(min, sums)) > 0
    found = torch.zeros_like(expected)
    for index in range(size):
        part = own_part(row, index, size)
        of_part = losses[part.part.begin : part.part.begin + len(part.input_ids)]
        found += sums_by_source(part, of_part, ["a", "b", "c"])
    assert torch.allclose(found, expected)


def test_bad_samples_and_the_ledger_count_a_row_once(tmp_path):
    bad = SampleError("s/9", "bad_record", "x")
    row = booked(grown(tiny_row(SAMPLES), errors=(("s", bad),)))
    parts = [own_part(row, index, 2) for index in range(2)]
    assert [len(part.errors) for part in parts] == [1, 0]
    sizes = []
    for rank, part in enumerate(parts):
        ledger = Ledger(tmp_path, "stage", rank, 0, [LedgerShard(source="s", location="x.tar", num_samples=9)])
        empty = ledger._records.stat().st_size
        ledger.record(0, part)
        ledger.close()
        sizes.append(ledger._records.stat().st_size - empty)
    assert sizes == [4 * 40, 0]


def test_ranks_next_to_each_other_read_the_same_rows():
    groups = [RowGroups(rank=rank, world_size=6, size=3) for rank in range(6)]
    assert [group.data_rank for group in groups] == [0, 0, 0, 1, 1, 1]
    assert [group.index for group in groups] == [0, 1, 2, 0, 1, 2]
    assert groups[0].data_world_size == 2
    row = booked(tiny_row(SAMPLES))
    ((step, parts),) = groups[4].own_parts([("step", [row, row])])
    assert step == "step" and [part.part.index for part in parts] == [1, 1]
    assert torch.equal(parts[1].input_ids, own_part(row, 1, 3).input_ids)
    alone = RowGroups(rank=2, world_size=6, size=1)
    assert (alone.data_rank, alone.index) == (2, 0) and next(alone.own_parts([("step", [row])]))[1][0] is row


@pytest.mark.parametrize("size", [0, 4])
def test_ranks_that_make_no_whole_groups_are_refused(size):
    with pytest.raises(ValueError, match=rf"6 ranks do not make groups of engine\.sequence_parallel={size}"):
        RowGroups(rank=0, world_size=6, size=size)


@pytest.mark.parametrize(("heads", "key_value_heads"), [(8, 8), (8, 2), (28, 4), (12, 3), (10, 2), (6, 1)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_every_head_is_computed_once_with_its_own_keys(heads, key_value_heads, ranks):
    done = []
    for share in head_shares(heads, key_value_heads, ranks):
        queries, keys = list(range(*share.queries)), list(range(*share.keys))
        run = len(queries) // len(keys)
        for place, head in enumerate(queries):
            key = keys[share.key_of[place] if share.key_of else place // run]
            assert key == head // (heads // key_value_heads)
        assert share.key_of is not None or len(queries) % len(keys) == 0
        done += queries
    assert done == list(range(heads))


def test_more_ranks_than_heads_are_refused():
    with pytest.raises(ValueError, match="4 heads cannot be shared by 8 ranks"):
        check_group(tiny_model(), 8)


def test_bounds_are_even_and_overlaps_count_what_lies_between():
    assert even_bounds(7, 3) == [0, 2, 4, 7]
    assert overlaps((3, 8), [0, 4, 4, 6, 9]) == [1, 0, 2, 2]


def test_visual_tokens_that_are_not_as_many_as_their_places_are_refused():
    group = SequenceGroup(index=1, size=2, processes=None)
    tokens = torch.zeros(4, 8, device="meta")
    assert group.place_visual(tokens, RowPart(index=1, begin=9, made=(0, 4, 8), placed=(0, 1, 8))).shape == (7, 8)
    with pytest.raises(ValueError, match="made 4 of 5"):
        group.place_visual(tokens, RowPart(index=1, begin=9, made=(0, 4, 9), placed=(0, 1, 9)))
    with pytest.raises(ValueError, match="8 image positions but 12 visual tokens"):
        group.place_visual(tokens, RowPart(index=1, begin=9, made=(0, 8, 12), placed=(0, 1, 8)))


def test_positions_that_tiles_share_unequally_are_refused():
    row = tiny_row([grown(SAMPLES[0], image_positions=SAMPLES[0].image_positions[:3]), SAMPLES[2]])
    with pytest.raises(ValueError, match="11 image positions but 3 tiles"):
        own_part(row, 0, 2)


def test_pictures_of_native_resolution_are_shared_by_frames():
    grids = ((1, 2, 3), (5, 1, 2), (1, 2, 2))  # 6, 10 and 4 tiles of a token each
    row = grown(
        tiny_row(SAMPLES),
        pixels=torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1, 1).expand(-1, 3, 2, 4, 4),
        grids=grids,
        num_images=20,
        image_positions=torch.arange(20),
    )
    parts = [own_part(row, index, 3) for index in range(3)]
    assert [part.grids for part in parts] == [((1, 2, 3),), ((3, 1, 2),), ((2, 1, 2), (1, 2, 2))]
    assert torch.equal(torch.cat([part.pixels for part in parts]), row.pixels)
    assert all(sum(t * h * w for t, h, w in part.grids) == len(part.pixels) for part in parts)
    none = grown(tiny_row([]), pixels=row.pixels[:1], grids=((1, 1, 1),))
    assert own_part(none, 1, 2).grids == ((1, 1, 1),)
    few = [own_part(grown(row, grids=((1, 4, 5),)), index, 3) for index in range(3)]
    assert [(part.num_images, part.grids) for part in few] == [(0, ((1, 1, 1),)), (20, ((1, 4, 5),)), (0, ((1, 1, 1),))]
    assert [len(part.pixels) for part in few] == [1, 20, 1]
