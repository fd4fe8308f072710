"""Rows handed over by loader workers through memory that both sides keep mapped.

torch hands a tensor over in a new shared memory file, which costs a system call and a page fault for every 4 KiB on
both sides, and fills /dev/shm. Here workers write rows where the main process reads them; what travels through
the queue is a few hundred bytes.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from eagle_train.types import PackedBatch, tile_shape

Allocate = Callable[..., torch.Tensor]
"""Returns memory for a tensor of a shape and type: `allocate(shape, dtype=dtype)`."""
ALIGNMENT = 64
"""Bytes; of a cache line, and more than any type asks for."""


class Place(NamedTuple):
    """Where in its slot a tensor lies."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)  # no slots: with them it takes three times as long to pickle
class HandedOver:
    """A row whose tensors lie in a slot, as it travels."""

    slot: int
    places: dict[str, Place]
    """Of its tensors in the slot, by field."""
    others: dict[str, Any]
    """Its other fields."""


class RowBuffers:
    """Slots for a row each. Made before the workers start, which inherit them by fork.

    Args:
        num_slots: rows that may be under way or in use at once.
        slot_bytes: of the largest row; memory is only taken up as far as rows fill it.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self._slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, num_slots * self._slot_bytes)  # anonymous and shared with children
        self._address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()

    def allocator(self, slot: int) -> Allocate:
        """Returns what gives memory of a slot, from its start; what does not fit is allocated as usual."""
        used = 0

        def allocate(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            nonlocal used
            start, size = used, math.prod(shape) * dtype.itemsize
            # An empty tensor has no address to be known by, and torch would move the slots to hand it over.
            if size == 0 or start + size > self._slot_bytes:
                return torch.empty(tuple(shape), dtype=dtype)
            used = -(-(start + size) // ALIGNMENT) * ALIGNMENT
            return self._tensor(slot, Place(start, tuple(shape), dtype))

        return allocate

    def hand_over(self, slot: int, batch: PackedBatch) -> HandedOver:
        """Returns a row for the queue: the tensors that lie in the slot stay there."""
        base = self._address + slot * self._slot_bytes
        places, others = {}, {}
        for field in fields(batch):
            value = getattr(batch, field.name)
            if isinstance(value, torch.Tensor) and 0 <= value.data_ptr() - base < self._slot_bytes:
                places[field.name] = Place(value.data_ptr() - base, tuple(value.shape), value.dtype)
            else:
                others[field.name] = value
        return HandedOver(slot, places, others)

    def take(self, row: HandedOver) -> PackedBatch:
        """Returns the row again; its tensors are valid until the slot is used for another."""
        tensors = {name: self._tensor(row.slot, place) for name, place in row.places.items()}
        return PackedBatch(**tensors, **row.others)

    def _tensor(self, slot: int, place: Place) -> torch.Tensor:
        start, count = slot * self._slot_bytes + place.start, math.prod(place.shape)
        return torch.frombuffer(self._memory, dtype=place.dtype, count=count, offset=start).view(place.shape)


def row_bytes(
    max_length: int, tokens_per_tile: int, tile_size: int, *, tile_depth: int = 0, position_rows: int = 1
) -> int:
    """Returns the bytes of the largest row of `max_length` tokens, see `PackedBatch`.

    Args:
        position_rows: rows of its position ids.
    """
    # ids, labels and places of images (at most all) of 8 bytes, positions too, weights and lengths of 4
    per_token = 3 * 8 + 8 * position_rows + 2 * 4
    tiles = max(1, max_length // tokens_per_tile)
    return per_token * (max_length + 2) + tiles * math.prod(tile_shape(tile_size, tile_depth)) + 8 * ALIGNMENT
