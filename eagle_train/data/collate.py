"""Samples of a row laid end to end as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from eagle_train.types import IGNORE_INDEX, EncodedSample, PackedBatch, SampleError, SampleUse


def pack(
    samples: Sequence[EncodedSample],
    errors: Sequence[tuple[str, SampleError]],
    *,
    filler_id: int,
    tile_size: int,
    row: int = -1,
    uses: Sequence[SampleUse] = (),
) -> PackedBatch:
    """Returns the samples laid end to end as one row; without samples, an empty row of weight zero.

    Args:
        errors: (source, error) of the row's samples that could not be encoded.
        filler_id: token id of the empty row's one position.
        tile_size: S, for the placeholder tile of a row without images.
        row: its number in the stage.
        uses: what became of every planned sample.
    """
    lengths = [len(sample.input_ids) for sample in samples] or [1]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tiles = [sample.pixels for sample in samples if len(sample.pixels)]
    offset_positions = [s.image_positions + int(start) for s, start in zip(samples, starts, strict=False)]
    return PackedBatch(
        input_ids=join([s.input_ids for s in samples], torch.full((1,), filler_id)),
        labels=join([s.labels for s in samples], torch.full((1,), IGNORE_INDEX)),
        loss_weights=join([s.loss_weights for s in samples], torch.zeros(1)),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=max(lengths),
        image_positions=join(offset_positions, torch.empty(0, dtype=torch.int64)),
        pixels=join(tiles, torch.zeros(1, 3, tile_size, tile_size, dtype=torch.uint8)),
        num_images=sum(len(t) for t in tiles),
        num_tokens=sum(lengths) if samples else 0,
        keys=tuple(sample.key for sample in samples),
        sources=tuple(sample.source for sample in samples),
        errors=tuple(errors),
        row=row,
        uses=tuple(uses),
    )


def join(tensors: Sequence[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    """Returns the concatenation of `tensors`, or `empty` if there are none."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(list(tensors)) if tensors else empty
