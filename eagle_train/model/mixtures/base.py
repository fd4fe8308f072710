"""What every mixture of vision encoders is, and how it runs and resamples its encoders."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from eagle_train.model.encoders.base import Resize, VisionEncoder, aligned
from eagle_train.types import Grid


class Mixture(nn.Module, ABC):
    """Vision encoders fused into one sequence of visual tokens per tile.

    Args:
        encoders: by name, in config order.
        grids: side of the grid on which each encoder's features enter the fusion, by name.
        tokens_per_tile: P, visual tokens of one tile.
        channels: C of those tokens.
        layer_norm: normalizes each encoder's features before they are fused, so that encoders of different
            scale start equal (random or unrelated weights).
        micro_batch: tiles that the encoders see at once; null: all of a row. With activation checkpointing, no
            more than their features outlives them: each micro-batch is recomputed when its gradient comes.
        resample: from an encoder's own grid to that of the fusion.

    Raises:
        ValueError: for a grid without tokens.
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, VisionEncoder],
        grids: Mapping[str, int],
        tokens_per_tile: int,
        channels: int,
        layer_norm: bool = False,
        micro_batch: int | None = None,
        resample: Resize = aligned,
    ) -> None:
        super().__init__()
        if small := {name: grid for name, grid in grids.items() if grid < 1}:
            raise ValueError(f"a grid has a side of at least 1, not {small}")
        self.encoders = nn.ModuleDict(encoders)
        self.grids = dict(grids)
        self.tokens_per_tile = tokens_per_tile
        self.channels = channels
        self.micro_batch = micro_batch
        self.checkpointing = False
        self.resample = resample
        norms = {name: nn.LayerNorm(encoder.channels) for name, encoder in encoders.items()}
        self.norms = nn.ModuleDict(norms if layer_norm else {})

    def forward(
        self,
        pixels: torch.Tensor,
        grids: Sequence[Grid] = (),
        *,
        placeholder: bool = False,
        alone: str | None = None,
    ) -> torch.Tensor:
        """Returns features (N, P, C) of tiles (N, 3, S, S) uint8.

        A row calls this module once, whatever it holds: under ZeRO-3 all ranks must.

        Args:
            grids: of native-resolution pictures (`NativeResolution`); flat tiles have none.
            placeholder: for rows without images: features (1, 1, C), see `placeholder`.
            alone: name of an encoder whose features are wanted instead, (N, P, C_i), see `seen_by`.
        """
        del grids
        if placeholder:
            return self.placeholder(pixels) if alone is None else self.seen_by(alone, pixels, placeholder=True)
        see = self.see if alone is None else partial(self.seen_by, alone)
        return torch.cat([self.kept_small(see, some) for some in pixels.split(self.micro_batch or len(pixels))])

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns fused features (N, P, C) of tiles (N, 3, S, S) uint8, all at once."""
        return self.fuse(self.encode(pixels))

    def kept_small(self, see: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
        """Returns `see(pixels)`, recomputed in the backward pass where micro-batches are."""
        recomputed = self.checkpointing and self.micro_batch is not None and torch.is_grad_enabled()
        if recomputed and any(parameter.requires_grad for parameter in self.parameters()):
            return checkpoint(see, pixels, use_reentrant=False)
        return see(pixels)

    def set_activation_checkpointing(self, encoders: Iterable[VisionEncoder]) -> None:
        """Recomputes micro-batches, and the layers of those `encoders` that do not refuse, in the backward pass."""
        self.checkpointing = True
        for encoder in encoders:
            if encoder.recompute:
                encoder.set_activation_checkpointing()

    def seen_by(self, name: str, pixels: torch.Tensor, *, placeholder: bool = False) -> torch.Tensor:
        """Returns one encoder's features (N, P, C_i), not normalized, on a square grid of P tokens.

        Args:
            placeholder: it sees the smallest image that reaches all its parameters.
        """
        encoder = self.encoders[name]
        features = run(encoder, pixels, encoder.placeholder_size if placeholder else None)
        return to_grid(features, math.isqrt(self.tokens_per_tile), self.resample).flatten(2).transpose(1, 2)

    def placeholder(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns features (1, 1, C) of the smallest images that reach every parameter.

        For rows without images: under ZeRO-3 every rank must run the same modules, but need not pay for a
        whole tile.

        Args:
            pixels: (1, 3, S, S) uint8, the row's placeholder tile.
        """
        return self.fuse(self.encode(pixels, placeholder=True)).mean(dim=1, keepdim=True)

    def encode(self, pixels: torch.Tensor, *, placeholder: bool = False) -> dict[str, torch.Tensor]:
        """Returns each encoder's features (N, C_i, G_i, G_i) of tiles (N, 3, S, S) uint8.

        Args:
            placeholder: encoders see the smallest image that reaches all their parameters.
        """
        return {
            name: run(encoder, pixels, encoder.placeholder_size if placeholder else None)
            for name, encoder in self.encoders.items()
        }

    @abstractmethod
    def fuse(self, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns (N, P, C) of each encoder's features (N, C_i, G_i, G_i)."""

    def tokens(self, name: str, features: torch.Tensor, grid: int) -> torch.Tensor:
        """Returns (N, grid * grid, C_i), row-major, of one encoder's features (N, C_i, G_i, G_i).

        They are resampled to the grid and then, where the mixture does it, normalized.
        """
        tokens = to_grid(features, grid, self.resample).flatten(2).transpose(1, 2)
        return self.norms[name](tokens) if name in self.norms else tokens

    def example(self, tile_size: int, num_tiles: int = 1) -> dict[str, Any]:
        """Returns the arguments of a call with `num_tiles` tiles of one picture, on the meta device."""
        shape = (num_tiles, 3, tile_size, tile_size)
        return {"pixels": torch.zeros(shape, dtype=torch.uint8, device="meta")}

    def arguments_within(self, max_tokens: int) -> dict[str, Any]:
        """Returns the constructor arguments, by dotted name, that make the largest such mixture within a limit.

        Args:
            max_tokens: the most visual tokens that a tile may make.
        """
        return {"grid": max(1, math.isqrt(max_tokens))}


def run(encoder: VisionEncoder, pixels: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Returns `encoder`'s features (N, C, G, G); a wholly frozen one runs in evaluation mode and keeps no graph.

    Args:
        size: side in pixels it sees; None: its `input_size`.
    """
    trained = eval_if_frozen(encoder)
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        return encoder(pixels, size)


def eval_if_frozen(encoder: VisionEncoder) -> bool:
    """Puts a wholly frozen encoder into evaluation mode; returns whether any of it is trained."""
    trained = any(parameter.requires_grad for parameter in encoder.parameters())
    if encoder.training and not trained:
        encoder.eval()
    return trained


def to_grid(features: torch.Tensor, grid: int, resample: Resize) -> torch.Tensor:
    """Returns (N, C, G, G) features resampled to (N, C, grid, grid) in float32, in their own dtype."""
    if features.shape[-1] == grid:
        return features
    return resample(features.float(), grid).to(features.dtype)
