"""Engines that make the loss of a row, or of a sample, NaN; a config's `engine._target_`."""

from __future__ import annotations

from typing import Any

import torch

from eagle_train.train.engine import PlainEngine
from eagle_train.train.zero.engine import ZeroEngine
from eagle_train.types import PackedBatch


def poison(losses: torch.Tensor, batch: PackedBatch, row: int | None, key: str | None) -> torch.Tensor:
    """Returns the losses with those of a row of this number, or of a sample whose key ends so, NaN."""
    if batch.row == row:
        return losses * float("nan")
    for place, own in enumerate(batch.keys):
        if key is not None and own.endswith(key):
            begin, end = batch.cu_seqlens[place : place + 2].tolist()
            return torch.cat([losses[:begin], losses[begin:end] * float("nan"), losses[end:]])
    return losses


class PoisonedPlain(PlainEngine):
    """A plain engine."""

    def __init__(self, *args: Any, row: int | None = None, key: str | None = None, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.row, self.key = row, key

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32."""
        return poison(super().forward(batch), batch, self.row, self.key)


class PoisonedZero(ZeroEngine):
    """A ZeRO engine."""

    def __init__(self, *args: Any, row: int | None = None, key: str | None = None, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.row, self.key = row, key

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32."""
        return poison(super().forward(batch), batch, self.row, self.key)


plain, zero2, zero3 = PoisonedPlain, PoisonedZero, PoisonedZero
