"""Engines for `chaos.py` that make the loss of one row NaN."""

from __future__ import annotations

from typing import Any

import torch

from eagle_train.train.engine import PlainEngine
from eagle_train.train.zero.engine import ZeroEngine
from eagle_train.types import PackedBatch


class PoisonedPlain(PlainEngine):
    """A plain engine; the loss of row number `poisoned_row` of the run's stage is NaN."""

    def __init__(self, *args: Any, poisoned_row: int, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.poisoned_row = poisoned_row

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32."""
        losses = super().forward(batch)
        return losses * float("nan") if batch.row == self.poisoned_row else losses


class PoisonedZero(ZeroEngine):
    """The same with ZeRO."""

    def __init__(self, *args: Any, poisoned_row: int, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.poisoned_row = poisoned_row

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32."""
        losses = super().forward(batch)
        return losses * float("nan") if batch.row == self.poisoned_row else losses


plain, zero2, zero3 = PoisonedPlain, PoisonedZero, PoisonedZero
