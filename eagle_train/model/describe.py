"""What a mixture makes of one tile, told without running it: pixels, grids, channels, tokens, FLOPs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

from eagle_train.model.flops import count_flops
from eagle_train.model.mixtures.base import Mixture

SEVERAL = 8
"""Tiles of a picture that tell, beside those of one, the linear from the quadratic part of an encoder's FLOPs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderGeometry:
    """One encoder's part in a mixture."""

    input_size: int
    """Side in pixels of what it sees of a tile."""
    grid: int
    """Side of the grid of its features."""
    channels: int
    fused_grid: int
    """Side of the grid on which its features enter the fusion."""
    flops: int
    """Forward, for one tile."""
    flops_per_pair: int = 0
    """Forward, of attention scores, for every two tiles of one picture or step in time; flat tiles see none other."""

    @property
    def resampling(self) -> Literal["up", "down", "none"]:
        """What the way from `grid` to `fused_grid` is."""
        if self.grid == self.fused_grid:
            return "none"
        return "up" if self.grid < self.fused_grid else "down"


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureGeometry:
    """A mixture's encoders by name, in config order, and what leaves it."""

    encoders: dict[str, EncoderGeometry]
    tokens_per_tile: int
    channels: int
    fusion_flops: int
    """Forward, for one tile, beside the encoders'."""


def describe(mixture: Mixture, tile_size: int) -> MixtureGeometry:
    """Returns the geometry of a mixture.

    Args:
        mixture: on the meta device.
        tile_size: S, side of a tile in pixels.
    """
    one, several = mixture.example(tile_size), mixture.example(tile_size, SEVERAL)
    seen: dict[Hashable, Any] = {}  # the mixture runs its encoders once more
    flops = {name: count_flops(encoder, seen=seen, **one) for name, encoder in mixture.encoders.items()}
    pairs = dict.fromkeys(flops, 0)
    if "grids" in one:
        # f(n) = a n + b n^2, so f(n) - n f(1) = b (n^2 - n)
        more = {name: count_flops(encoder, **several) for name, encoder in mixture.encoders.items()}
        pairs = {name: (more[name] - SEVERAL * flops[name]) // (SEVERAL**2 - SEVERAL) for name in flops}
    encoders = {
        name: EncoderGeometry(
            input_size=encoder.input_size,
            grid=encoder.grid,
            channels=encoder.channels,
            fused_grid=mixture.grids[name],
            flops=flops[name] - pairs[name],
            flops_per_pair=pairs[name],
        )
        for name, encoder in mixture.encoders.items()
    }
    return MixtureGeometry(
        encoders=encoders,
        tokens_per_tile=mixture.tokens_per_tile,
        channels=mixture.channels,
        fusion_flops=count_flops(mixture, seen=seen, **one) - sum(flops.values()),
    )
