"""What every mixture of vision encoders is, and how it runs and resamples its encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from eagle_train.model.encoders.base import VisionEncoder


class Mixture(nn.Module, ABC):
    """Vision encoders fused into one sequence of visual tokens per tile.

    Args:
        encoders: by name, in config order.
        tokens_per_tile: P, visual tokens of one tile.
        channels: C of those tokens.
        micro_batch: tiles that the encoders see at once; null: all of a row.
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, VisionEncoder],
        tokens_per_tile: int,
        channels: int,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.tokens_per_tile = tokens_per_tile
        self.channels = channels
        self.micro_batch = micro_batch

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns features (N, P, C) of tiles (N, 3, S, S) uint8."""
        pieces = pixels.split(self.micro_batch or len(pixels))
        return torch.cat([self.fuse({n: run(e, some) for n, e in self.encoders.items()}) for some in pieces])

    def placeholder(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns features (1, 1, C) of the smallest images that reach every parameter.

        For rows without images: under ZeRO-3 every rank must run the same modules, but need not pay for a
        whole tile.

        Args:
            pixels: (1, 3, S, S) uint8, the row's placeholder tile.
        """
        return self.fuse({n: run(e, pixels, e.placeholder_size) for n, e in self.encoders.items()})[:, :1]

    @abstractmethod
    def fuse(self, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns (N, P, C) of each encoder's features (N, C_i, G_i, G_i)."""


def run(encoder: VisionEncoder, pixels: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Returns `encoder`'s features (N, C, G, G); a wholly frozen one runs in evaluation mode and keeps no graph.

    Args:
        size: side in pixels it sees; None: its `input_size`.
    """
    trained = any(parameter.requires_grad for parameter in encoder.parameters())
    if encoder.training and not trained:
        encoder.eval()
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        return encoder(pixels, size)


def to_grid(features: torch.Tensor, grid: int) -> torch.Tensor:
    """Returns (N, C, G, G) features resampled to (N, C, grid, grid) in float32, in their own dtype.

    Source: Eagle resamples bilinearly with aligned corners.
    """
    if features.shape[-1] == grid:
        return features
    resized = F.interpolate(features.float(), size=(grid, grid), mode="bilinear", align_corners=True)
    return resized.to(features.dtype)
