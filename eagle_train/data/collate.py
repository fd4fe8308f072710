"""Samples of a row laid end to end as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from eagle_train.data.positions import Positions, sequential
from eagle_train.data.row_buffers import Allocate
from eagle_train.types import IGNORE_INDEX, EncodedSample, PackedBatch, SampleError, SampleUse, tile_shape


def pack(
    samples: Sequence[EncodedSample],
    errors: Sequence[tuple[str, SampleError]],
    *,
    filler_id: int,
    tile_size: int,
    tile_depth: int = 0,
    positions: Positions = sequential,
    row: int = -1,
    uses: Sequence[SampleUse] = (),
    allocate: Allocate = torch.empty,
    pixels: torch.Tensor | None = None,
) -> PackedBatch:
    """Returns the samples laid end to end as one row; without samples, an empty row of weight zero.

    Args:
        errors: (source, error) of the row's samples that could not be encoded.
        filler_id: token id of the empty row's one position.
        tile_size, tile_depth: S and D (0 of flat tiles), for the placeholder tile of a row without images.
        positions: the position ids of a sample.
        row: its number in the stage.
        uses: what became of every planned sample.
        allocate: gives the memory of the larger tensors.
        pixels: (N, *tile_shape) uint8, the samples' tiles where they were decoded end to end; None: they are copied.
    """
    lengths = [len(sample.input_ids) for sample in samples] or [1]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tiles = [sample.pixels for sample in samples if len(sample.pixels)]
    offset_positions = [s.image_positions + int(start) for s, start in zip(samples, starts, strict=False)]
    grids = tuple(grid for sample in samples for grid in sample.grids)
    if not tiles:
        grids = ((1, 1, 1),) if tile_depth else ()
    if pixels is None or not tiles:
        pixels = join(tiles or [torch.zeros((1, *tile_shape(tile_size, tile_depth)), dtype=torch.uint8)], allocate)
    of_samples = [positions(len(s.input_ids), s.image_positions.numpy(), s.grids) for s in samples]
    position_ids = [torch.from_numpy(ids) for ids in of_samples or [positions(1, np.empty(0, np.int64), ())]]
    return PackedBatch(
        input_ids=join([s.input_ids for s in samples] or [torch.full((1,), filler_id)], allocate),
        labels=join([s.labels for s in samples] or [torch.full((1,), IGNORE_INDEX)], allocate),
        loss_weights=join([s.loss_weights for s in samples] or [torch.zeros(1)], allocate),
        position_ids=join(position_ids, allocate, dim=-1),
        cu_seqlens=join([torch.from_numpy(starts.astype(np.int32))], allocate),
        max_seqlen=max(lengths),
        segment_lengths=tuple(lengths),
        image_positions=join(offset_positions or [torch.empty(0, dtype=torch.int64)], allocate),
        pixels=pixels,
        grids=grids,
        num_images=sum(len(t) for t in tiles),
        num_tokens=sum(lengths) if samples else 0,
        num_targets=sum(count_targets(sample.labels) for sample in samples),
        keys=tuple(sample.key for sample in samples),
        sources=tuple(sample.source for sample in samples),
        errors=tuple(errors),
        row=row,
        uses=tuple(uses),
    )


def count_targets(labels: torch.Tensor) -> int:
    """Returns how many positions have a label, of (T,) int64."""
    return int(torch.count_nonzero(labels != IGNORE_INDEX))


def join(tensors: Sequence[torch.Tensor], allocate: Allocate = torch.empty, dim: int = 0) -> torch.Tensor:
    """Returns the concatenation of `tensors`, which are at least one, in memory from `allocate`."""
    first = tensors[0]
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.cat(list(tensors), dim=dim, out=allocate(shape, dtype=first.dtype))
