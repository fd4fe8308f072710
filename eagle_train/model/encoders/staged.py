"""Encoders that can be stopped between layers, so that a mixture may change their features there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from eagle_train.model.encoders.base import VisionEncoder


class StagedEncoder(VisionEncoder):
    """A vision encoder whose features keep their grid and channels from its first layer to its last."""

    @property
    @abstractmethod
    def layers(self) -> Sequence[torch.nn.Module]:
        """The layers in order; `advance` runs them."""

    @abstractmethod
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the first layer's input (N, C, G, G) of normalized images (N, 3, s, s)."""

    @abstractmethod
    def advance(self, features: torch.Tensor, layers: Sequence[torch.nn.Module]) -> torch.Tensor:
        """Returns (N, C, G, G): the output of `layers`, some of the encoder's, for features (N, C, G, G)."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images (N, 3, s, s)."""
        return self.advance(self.embed(images), self.layers)
