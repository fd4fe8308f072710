"""Tokens of one encoder that look into the maps of the others: deformable cross-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from eagle_train.model.encoders.base import VisionEncoder
from eagle_train.model.geometry import GeometryError
from eagle_train.model.mixtures.anchored import AnchoredMixture


class DeformableAttention(AnchoredMixture):
    """The base encoder's tokens, each with what it found around its place in the other encoders' maps.

        y = x + attention(LayerNorm(x), {V_j h_j})      V_j linear to the base's C, with bias

    x are the base's tokens, h_j the sources' features on their own grids, never resampled. It takes the place of
    Mini-Gemini's attention in a fixed window of the high-resolution map. A source's bias in V_j and its own
    offsets and logits in the attention tell it from the other sources, as a level embedding would.

    Args:
        encoders: by name.
        base: name of the encoder that makes the tokens.
        heads: attention heads; they divide the base's channels.
        points: places that each head samples in each source.
        layer_norm, micro_batch: see `Mixture`.

    Raises:
        GeometryError: for heads that do not divide the base's channels.
        ValueError: for a base that is missing or alone.

    Source: Eagle (arXiv 2408.15998), fusion by deformable attention, after Mini-Gemini (arXiv 2403.18814).
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, VisionEncoder],
        base: str,
        heads: int = 8,
        points: int = 4,
        layer_norm: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        grids = {name: encoder.grid for name, encoder in encoders.items()}
        super().__init__(encoders=encoders, base=base, grids=grids, layer_norm=layer_norm, micro_batch=micro_batch)
        self.norm = nn.LayerNorm(self.channels)
        self.values = nn.ModuleDict({n: value_layer(encoders[n].channels, self.channels) for n in self.sources})
        self.attention = DeformableSampling(self.channels, heads=heads, sources=len(self.sources), points=points)

    def fuse(self, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns (N, G * G, C), row-major, of each encoder's features (N, C_i, G_i, G_i)."""
        queries = self.tokens(self.base, maps[self.base], maps[self.base].shape[-1])
        values = []
        for name in self.sources:
            tokens = self.values[name](self.tokens(name, maps[name], maps[name].shape[-1]))
            values.append(tokens.transpose(1, 2).unflatten(2, maps[name].shape[2:]))
        return queries + self.attention(self.norm(queries), values)


class DeformableSampling(nn.Module):
    """Multi-head attention of tokens on a grid to a few learnt places around each in several maps.

    For a token q at the place p in [0, 1]^2 of its grid (cell centres), with H heads, S maps v_s of side G_s and
    K points:

        out(q) = W sum over h of sum over s, k of A_hsk(q) v_s,h(p + D_hsk(q) / G_s)

    A is a softmax over all S * K places of linear functions of q; D, in cells of the map, is linear in q. v_s,h
    is the h-th part of the map's channels, read bilinearly, 0 outside.

    At first A is uniform and D a ring: heads look in H directions, the k-th point k cells away.

    Args:
        channels: C of tokens and maps.
        heads, sources, points: H, S, K.

    Raises:
        GeometryError: if the heads do not divide the channels.

    Source: Deformable DETR (arXiv 2010.04159), equation 3 and its initialization.
    """

    def __init__(self, channels: int, *, heads: int, sources: int, points: int) -> None:
        super().__init__()
        if channels % heads:
            divisors = sorted((n for n in range(1, channels + 1) if channels % n == 0), key=lambda n: abs(n - heads))
            raise GeometryError(
                f"{heads} heads do not divide {channels} channels", nearest=divisors[:2], argument="heads"
            )
        self.heads, self.sources, self.points = heads, sources, points
        self.offsets = nn.Linear(channels, heads * sources * points * 2)
        self.logits = nn.Linear(channels, heads * sources * points)
        self.out = nn.Linear(channels, channels)
        for layer in (self.offsets, self.logits):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(ring(heads, points)[:, None].expand(-1, sources, -1, -1).flatten())
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, queries: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns (N, Q, C) of tokens (N, Q, C), row-major on a square grid, and S maps (N, C, G_s, G_s)."""
        num_tiles, num_queries, channels = queries.shape
        shape = (num_tiles, num_queries, self.heads, self.sources, self.points)
        # Places need more than bfloat16's 8 bits, so all sampling is in float32.
        offsets = self.offsets(queries).float().view(*shape, 2)
        weights = self.logits(queries).float().view(*shape[:3], -1).softmax(dim=-1).view(shape)
        places = centres(math.isqrt(num_queries), queries.device)[None, :, None, None]
        found = queries.new_zeros((num_tiles * self.heads, channels // self.heads, num_queries), dtype=torch.float32)
        for source, value in enumerate(maps):
            where = 2.0 * (places + offsets[:, :, :, source] / value.shape[-1]) - 1.0
            sampled = F.grid_sample(
                value.float().reshape(-1, channels // self.heads, *value.shape[2:]),
                where.transpose(1, 2).flatten(0, 1),
                align_corners=False,
            )
            found = found + (sampled * weights[:, :, :, source].transpose(1, 2).flatten(0, 1)[:, None]).sum(dim=-1)
        return self.out(found.view(num_tiles, channels, num_queries).transpose(1, 2).to(queries.dtype))


def ring(heads: int, points: int) -> torch.Tensor:
    """Returns (heads, points, 2) float32 offsets (x, y): head h in the direction 2 pi h / heads, the k-th k far.

    Distance is that of the larger coordinate: a square ring.
    """
    angles = torch.arange(heads, dtype=torch.float32) * (2.0 * math.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    return directions[:, None] * torch.arange(1, points + 1, dtype=torch.float32)[:, None]


def centres(grid: int, device: torch.device) -> torch.Tensor:
    """Returns (grid * grid, 2) float32: (x, y) in [0, 1] of the cells' centres, row-major."""
    line = (torch.arange(grid, dtype=torch.float32, device=device) + 0.5) / grid
    rows, cols = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([cols, rows], dim=-1).flatten(0, 1)


def value_layer(in_channels: int, channels: int) -> nn.Linear:
    """Returns a linear layer with Xavier weights and no bias at first, as Deformable DETR's values."""
    layer = nn.Linear(in_channels, channels)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
