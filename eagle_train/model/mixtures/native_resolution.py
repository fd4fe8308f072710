"""One encoder of pictures of any size: as many visual tokens as a picture has tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from eagle_train.model.encoders.qwen2_vit import Qwen2Vit
from eagle_train.model.mixtures.base import Mixture, eval_if_frozen
from eagle_train.types import Grid


class NativeResolution(Mixture):
    """The features of one native-resolution encoder as they are: one token per tile.

    Args:
        encoders: exactly one.

    Raises:
        ValueError: for another number of encoders.
    """

    def __init__(self, *, encoders: Mapping[str, Qwen2Vit]) -> None:
        if len(encoders) != 1:
            raise ValueError(f"pictures of native resolution are seen by one encoder, not by {sorted(encoders)}")
        ((name, encoder),) = encoders.items()
        super().__init__(encoders=encoders, grids={name: 1}, tokens_per_tile=1, channels=encoder.channels)

    @property
    def encoder(self) -> Qwen2Vit:
        """Its encoder."""
        (encoder,) = self.encoders.values()
        return encoder

    def forward(
        self,
        pixels: torch.Tensor,
        grids: Sequence[Grid] = (),
        *,
        placeholder: bool = False,
        alone: str | None = None,
    ) -> torch.Tensor:
        """Returns features (N, 1, C) of tiles (N, 3, D, S, S) uint8.

        A frozen encoder runs in evaluation mode and keeps no graph.

        Args:
            grids: of the pictures, in the order of their tiles.
            placeholder: makes no difference: the placeholder tile is a picture like any other.
            alone: no difference either: there is only one encoder.
        """
        del placeholder, alone
        trained = eval_if_frozen(self.encoder)
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.encoder(pixels, grids)[:, None]

    def fuse(self, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the features of the only encoder."""
        (features,) = maps.values()
        return features

    def example(self, tile_size: int, num_tiles: int = 1) -> dict[str, Any]:
        """Returns the arguments of a picture of `num_tiles` tiles in a row, on the meta device."""
        shape = (num_tiles, 3, self.encoder.frames, tile_size, tile_size)
        return {"pixels": torch.zeros(shape, dtype=torch.uint8, device="meta"), "grids": ((1, 1, num_tiles),)}
