"""A mixture of vision encoders on one grid."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from eagle_train.model.encoders.base import VisionEncoder


class ChannelConcat(nn.Module):
    """Encoders side by side: their features on one grid, concatenated on channels in config order.

    Args:
        encoders: by name; the order is that of the concatenation.
        grid: side of the common grid; tokens per tile are grid * grid.
        layer_norm: normalizes each encoder's features before they are joined, so that encoders of
            different scale start equal (random or unrelated weights).

    Source: Eagle (arXiv 2408.15998), channel concatenation.
    """

    def __init__(self, *, encoders: Mapping[str, VisionEncoder], grid: int, layer_norm: bool = False) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.grid = grid
        self.channels = sum(encoder.channels for encoder in encoders.values())
        norms = {name: nn.LayerNorm(encoder.channels) for name, encoder in encoders.items()}
        self.norms = nn.ModuleDict(norms if layer_norm else {})

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile."""
        return self.grid * self.grid

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns features (N, tokens_per_tile, C), row-major, of tiles (N, 3, S, S) uint8."""
        features = []
        for name, encoder in self.encoders.items():
            tokens = to_grid(encode(encoder, pixels), self.grid).flatten(2).transpose(1, 2)
            features.append(self.norms[name](tokens) if name in self.norms else tokens)
        return torch.cat(features, dim=-1)


def encode(encoder: VisionEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """Returns `encoder`'s features; a wholly frozen one keeps no graph."""
    trained = any(parameter.requires_grad for parameter in encoder.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        return encoder(pixels)


def to_grid(features: torch.Tensor, grid: int) -> torch.Tensor:
    """Returns (N, C, G, G) features resampled to (N, C, grid, grid) in float32, in their own dtype.

    Source: Eagle resamples bilinearly with aligned corners.
    """
    if features.shape[-1] == grid:
        return features
    resized = F.interpolate(features.float(), size=(grid, grid), mode="bilinear", align_corners=True)
    return resized.to(features.dtype)
