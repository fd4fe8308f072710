"""From encoder features to LLM embeddings."""

from __future__ import annotations

import torch
from torch import nn


class MlpProjector(nn.Module):
    """Linear layers with GELU between: `mlp{depth}x_gelu`.

    Args:
        in_channels: C of the mixture.
        hidden_size: H of the LLM.
        depth: number of linear layers.
        layer_norm: normalizes its input first (Eagle 2's connector).

    Source: LLaVA-1.5 and Eagle 1 (`mlp2x_gelu`: Linear, exact GELU, Linear, with biases).
    """

    def __init__(self, in_channels: int, hidden_size: int, *, depth: int = 2, layer_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(in_channels)] if layer_norm else []
        layers.append(nn.Linear(in_channels, hidden_size))
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns (..., H) embeddings of (..., C) features."""
        return self.layers(features)
