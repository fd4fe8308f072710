"""Mixtures that keep the tokens of one encoder, their base, and enrich them with what the others see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from eagle_train.model.encoders.base import VisionEncoder
from eagle_train.model.mixtures.base import Mixture


class AnchoredMixture(Mixture):
    """A mixture with the tokens and channels of its base encoder; the others are its sources.

    Args:
        encoders: by name.
        base: name of the encoder that anchors the tokens.
        grids: see `Mixture`; of the sources.
        layer_norm, micro_batch: see `Mixture`.

    Raises:
        ValueError: if there is no encoder named `base`, or no other.
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, VisionEncoder],
        base: str,
        grids: Mapping[str, int],
        layer_norm: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        if base not in encoders or len(encoders) < 2:
            raise ValueError(f"base {base!r} must be one of two or more encoders; the encoders are {sorted(encoders)}")
        anchor = encoders[base]
        super().__init__(
            encoders=encoders,
            grids={**grids, base: anchor.grid},
            tokens_per_tile=anchor.grid * anchor.grid,
            channels=anchor.channels,
            layer_norm=layer_norm,
            micro_batch=micro_batch,
        )
        self.base = base
        self.sources = tuple(name for name in encoders if name != base)

    def arguments_within(self, max_tokens: int) -> dict[str, Any]:
        """Returns the base's image size at which it makes the most tokens that are at most `max_tokens`."""
        anchor = self.encoders[self.base]
        patch_size = anchor.input_size // anchor.grid
        return {f"encoders.{self.base}.image_size": max(1, math.isqrt(max_tokens)) * patch_size}
