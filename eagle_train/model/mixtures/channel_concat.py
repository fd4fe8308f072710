"""Encoders side by side: channel concatenation, Eagle's fusion."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from eagle_train.model.encoders.base import Resize, VisionEncoder, aligned
from eagle_train.model.mixtures.base import Mixture, common_grid


class ChannelConcat(Mixture):
    """Features of all encoders on one grid, concatenated on channels in config order.

    Args:
        encoders: by name; the order is that of the concatenation.
        grid: side of the common grid; tokens per tile are grid * grid. Null: that of `common_grid`.
        layer_norm, micro_batch, resample: see `Mixture`.

    Source: Eagle (arXiv 2408.15998), channel concatenation.
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, VisionEncoder],
        grid: int | None = None,
        layer_norm: bool = False,
        micro_batch: int | None = None,
        resample: Resize = aligned,
    ) -> None:
        grid = common_grid(encoders) if grid is None else grid
        super().__init__(
            encoders=encoders,
            grids=dict.fromkeys(encoders, grid),
            tokens_per_tile=grid * grid,
            channels=sum(encoder.channels for encoder in encoders.values()),
            layer_norm=layer_norm,
            micro_batch=micro_batch,
            resample=resample,
        )

    def fuse(self, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns (N, grid * grid, C), row-major, of each encoder's features (N, C_i, G_i, G_i)."""
        return torch.cat([self.tokens(n, features, self.grids[n]) for n, features in maps.items()], dim=-1)
