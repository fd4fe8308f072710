"""The loss of a step by source, as the metrics have it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from eagle_train.types import PackedBatch


def sums_by_source(row: PackedBatch, losses: torch.Tensor, sources: list[str]) -> torch.Tensor:
    """Returns (number of sources, 2) float64, on the losses' device: weighted loss sum and weight sum by source.

    Args:
        row: best on the host: a device would have to be waited for.
        losses: (T,) float32, weighted.
    """
    weights = row.loss_weights.to(losses.device, non_blocking=True)
    before = F.pad(torch.stack([losses, weights]).double().cumsum(1), (1, 0))
    begin = 0 if row.part is None else row.part.begin
    bounds = (row.cu_seqlens.long() - begin).clamp(0, len(losses))  # samples may begin and end on other ranks
    places = torch.tensor([sources.index(source) for source in row.sources], dtype=torch.int64)
    # No device is waited for: an index on the host, or a tensor made on the device, would do so.
    bounds, places = (index.to(losses.device, non_blocking=True) for index in (bounds, places))
    sums = before.index_select(1, bounds).diff(dim=1).T
    return losses.new_zeros(len(sources), 2, dtype=torch.float64).index_add(0, places, sums[: len(places)])


def mean_losses(sums: torch.Tensor, sources: list[str]) -> dict[str, float]:
    """Returns the mean loss of all and by source, under the names of the metrics.

    Args:
        sums: (number of sources, 2) float64, weighted loss sums and weight sums.
    """
    names = ["train/loss", *(f"train/loss/{source}" for source in sources)]
    pairs = zip(names, [sums.sum(0).tolist(), *sums.tolist()], strict=True)
    return {name: loss / weight for name, (loss, weight) in pairs if weight > 0}
