"""Packing: which samples share a row of `capacity` tokens. Pure functions over lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch

from eagle_train.types import IGNORE_INDEX, EncodedSample, PackedBatch, SampleError


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Returns rows of indices into `lengths`, each row's sum at most `capacity`.

    The longest sample first, each into the fullest row that still holds it. Ties go to the earlier
    sample and the earlier row, so the result depends on the order of `lengths` alone. Within a row,
    samples keep their order in `lengths`.

    Args:
        lengths: (n,) tokens per sample, each in 1..capacity.
        capacity: tokens of a row.

    Source: D. S. Johnson, Near-optimal bin packing algorithms, 1973.
    """
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            left, row = open_rows.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if left > length:
            insort(open_rows, (left - length, row))
    return [sorted(row) for row in rows]


def pack(
    samples: Sequence[EncodedSample],
    errors: Sequence[tuple[str, SampleError]],
    *,
    filler_id: int,
    tile_size: int,
) -> PackedBatch:
    """Returns the samples laid end to end as one row; without samples, an empty row of weight zero.

    Args:
        errors: (source, error) of the row's samples that could not be encoded.
        filler_id: token id of the empty row's one position.
        tile_size: S, for the placeholder tile of a row without images.
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
    )


def join(tensors: Sequence[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    """Returns the concatenation of `tensors`, or `empty` if there are none."""
    return torch.cat(list(tensors)) if tensors else empty
