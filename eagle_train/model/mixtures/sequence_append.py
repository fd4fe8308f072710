"""Encoders one after another: sequence append."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from eagle_train.model.encoders.base import VisionEncoder
from eagle_train.model.mixtures.base import Mixture


class SequenceAppend(Mixture):
    """The tokens of each encoder's own grid, laid one encoder after another in config order.

    P is the sum over encoders of g_i * g_i. Encoders that are not of the common width get a linear layer to it.

    Args:
        encoders: by name; the order is that of the sequence.
        grids: side of the grid by encoder name; encoders that are not named keep their own.
        channels: the common width C; null: that of the widest encoder.
        layer_norm, micro_batch: see `Mixture`.

    Raises:
        ValueError: if `grids` names an encoder that is not there.

    Source: Eagle (arXiv 2408.15998), sequence append.
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, VisionEncoder],
        grids: Mapping[str, int] | None = None,
        channels: int | None = None,
        layer_norm: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        if unknown := sorted(set(grids or {}) - set(encoders)):
            raise ValueError(f"grids names {unknown}, the encoders are {sorted(encoders)}")
        grids = {name: encoder.grid for name, encoder in encoders.items()} | dict(grids or {})
        channels = channels or max(encoder.channels for encoder in encoders.values())
        super().__init__(
            encoders=encoders,
            grids=grids,
            tokens_per_tile=sum(grid * grid for grid in grids.values()),
            channels=channels,
            layer_norm=layer_norm,
            micro_batch=micro_batch,
        )
        widths = {name: encoder.channels for name, encoder in encoders.items()}
        self.widen = nn.ModuleDict({n: nn.Linear(width, channels) for n, width in widths.items() if width != channels})

    def fuse(self, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns (N, P, C), each encoder's tokens row-major, of features (N, C_i, G_i, G_i)."""
        pieces = []
        for name, features in maps.items():
            tokens = self.tokens(name, features, self.grids[name])
            pieces.append(self.widen[name](tokens) if name in self.widen else tokens)
        return torch.cat(pieces, dim=1)

    def arguments_within(self, max_tokens: int) -> dict[str, Any]:
        """Returns the grids of at most `max_tokens` tokens together, the finest made coarser first."""
        grids = dict(self.grids)
        while sum(grid * grid for grid in grids.values()) > max_tokens and max(grids.values()) > 1:
            grids[max(grids, key=grids.__getitem__)] -= 1
        return {"grids": grids}
