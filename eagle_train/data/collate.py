"""Samples of a row laid end to end as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from eagle_train.data.row_buffers import Allocate
from eagle_train.types import IGNORE_INDEX, EncodedSample, PackedBatch, SampleError, SampleUse


def pack(
    samples: Sequence[EncodedSample],
    errors: Sequence[tuple[str, SampleError]],
    *,
    filler_id: int,
    tile_size: int,
    row: int = -1,
    uses: Sequence[SampleUse] = (),
    allocate: Allocate = torch.empty,
    pixels: torch.Tensor | None = None,
) -> PackedBatch:
    """Returns the samples laid end to end as one row; without samples, an empty row of weight zero.

    Args:
        errors: (source, error) of the row's samples that could not be encoded.
        filler_id: token id of the empty row's one position.
        tile_size: S, for the placeholder tile of a row without images.
        row: its number in the stage.
        uses: what became of every planned sample.
        allocate: gives the memory of the larger tensors.
        pixels: (N, 3, S, S) uint8, the samples' tiles where they were decoded end to end; None: they are copied.
    """
    lengths = [len(sample.input_ids) for sample in samples] or [1]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tiles = [sample.pixels for sample in samples if len(sample.pixels)]
    offset_positions = [s.image_positions + int(start) for s, start in zip(samples, starts, strict=False)]
    if pixels is None or not tiles:
        pixels = join(tiles or [torch.zeros(1, 3, tile_size, tile_size, dtype=torch.uint8)], allocate)
    return PackedBatch(
        input_ids=join([s.input_ids for s in samples] or [torch.full((1,), filler_id)], allocate),
        labels=join([s.labels for s in samples] or [torch.full((1,), IGNORE_INDEX)], allocate),
        loss_weights=join([s.loss_weights for s in samples] or [torch.zeros(1)], allocate),
        position_ids=join([torch.arange(length) for length in lengths], allocate),
        cu_seqlens=join([torch.from_numpy(starts.astype(np.int32))], allocate),
        max_seqlen=max(lengths),
        segment_lengths=tuple(lengths),
        image_positions=join(offset_positions or [torch.empty(0, dtype=torch.int64)], allocate),
        pixels=pixels,
        num_images=sum(len(t) for t in tiles),
        num_tokens=sum(lengths) if samples else 0,
        keys=tuple(sample.key for sample in samples),
        sources=tuple(sample.source for sample in samples),
        errors=tuple(errors),
        row=row,
        uses=tuple(uses),
    )


def join(tensors: Sequence[torch.Tensor], allocate: Allocate = torch.empty) -> torch.Tensor:
    """Returns the concatenation of `tensors`, which are at least one, in memory from `allocate`."""
    first = tensors[0]
    shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
    return torch.cat(list(tensors), out=allocate(shape, dtype=first.dtype))
