"""Encoders side by side: channel concatenation, Eagle's fusion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from eagle_train.model.encoders.base import VisionEncoder
from eagle_train.model.mixtures.base import Mixture, to_grid


class ChannelConcat(Mixture):
    """Features of all encoders on one grid, concatenated on channels in config order.

    Args:
        encoders: by name; the order is that of the concatenation.
        grid: side of the common grid; tokens per tile are grid * grid.
        layer_norm: normalizes each encoder's features before they are joined, so that encoders of
            different scale start equal (random or unrelated weights).
        micro_batch: see `Mixture`.

    Source: Eagle (arXiv 2408.15998), channel concatenation.
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, VisionEncoder],
        grid: int,
        layer_norm: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        channels = sum(encoder.channels for encoder in encoders.values())
        super().__init__(encoders=encoders, tokens_per_tile=grid * grid, channels=channels, micro_batch=micro_batch)
        self.grid = grid
        norms = {name: nn.LayerNorm(encoder.channels) for name, encoder in encoders.items()}
        self.norms = nn.ModuleDict(norms if layer_norm else {})

    def fuse(self, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns (N, grid * grid, C), row-major, of each encoder's features (N, C_i, G_i, G_i)."""
        features = []
        for name, encoded in maps.items():
            tokens = to_grid(encoded, self.grid).flatten(2).transpose(1, 2)
            features.append(self.norms[name](tokens) if name in self.norms else tokens)
        return torch.cat(features, dim=-1)
