"""Rows handed over in shared memory are the rows that were made, and no slot is used for two at once."""

import os

import pytest
import torch

from eagle_train.data.collate import pack
from eagle_train.data.row_buffers import HandedOver, RowBuffers, row_bytes
from eagle_train.types import PackedBatch
from tests.toys import TILE, TOKENS_PER_TILE, tiny_sample

SAMPLES = [tiny_sample(i, tiles=i % 3, text=8 + i) for i in range(6)]
ROWS = [SAMPLES, SAMPLES[:1], [], SAMPLES[3:4], SAMPLES[1:3]]
BYTES = row_bytes(200, TOKENS_PER_TILE, TILE)


def made(samples, **allocate) -> PackedBatch:
    return pack(samples, [], filler_id=0, tile_size=TILE, **allocate)


def assert_equal(one: PackedBatch, other: PackedBatch):
    for name in one.__slots__:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        else:
            assert a == b, name


def test_rows_written_by_another_process_are_read_as_they_were_made():
    buffers = RowBuffers(len(ROWS), BYTES)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for slot, samples in enumerate(ROWS):
            made(samples, allocate=buffers.allocator(slot))
        os.write(write, b"x")
        os._exit(0)
    assert os.read(read, 1) == b"x" and os.waitpid(child, 0)[1] == 0
    for slot, samples in enumerate(ROWS):
        row = buffers.hand_over(slot, made(samples))  # no tensor of this one lies in the slot
        assert not row.places
        places = buffers.hand_over(slot, made(samples, allocate=RowBuffers(1, BYTES).allocator(0))).places
        assert not places, "nor of one in other buffers"
    fresh = RowBuffers(len(ROWS), BYTES)
    rows = [fresh.hand_over(slot, made(samples, allocate=fresh.allocator(slot))) for slot, samples in enumerate(ROWS)]
    for row, samples in zip(rows, ROWS, strict=True):
        other = HandedOver(row.slot, row.places, row.others)
        assert_equal(buffers.take(other), made(samples))


def test_every_tensor_of_a_row_lies_in_its_slot_but_empty_ones():
    buffers = RowBuffers(1, BYTES)
    row = buffers.hand_over(0, made(SAMPLES, allocate=buffers.allocator(0)))
    assert not any(isinstance(value, torch.Tensor) for value in row.others.values())
    text = buffers.hand_over(0, made([SAMPLES[3]], allocate=buffers.allocator(0)))
    left = {name for name, value in text.others.items() if isinstance(value, torch.Tensor)}
    assert left == {"image_positions"}


@pytest.mark.parametrize("size", [64, 2000, BYTES])
def test_what_does_not_fit_is_handed_over_as_usual(size):
    buffers = RowBuffers(2, size)
    row = buffers.hand_over(1, made(SAMPLES, allocate=buffers.allocator(1)))
    assert_equal(buffers.take(row), made(SAMPLES))


def test_the_bound_holds_the_largest_row():
    tokens = sum(len(sample.input_ids) for sample in SAMPLES)
    samples = [tiny_sample(i, tiles=5, text=3) for i in range(40)]
    longest = sum(len(sample.input_ids) for sample in samples)
    for chosen, length in ((SAMPLES, tokens), (samples, longest)):
        buffers = RowBuffers(1, row_bytes(length, TOKENS_PER_TILE, TILE))
        row = buffers.hand_over(0, made(chosen, allocate=buffers.allocator(0)))
        assert not any(isinstance(value, torch.Tensor) for value in row.others.values())
