"""What every vision encoder is, and the resize and normalization they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F


Resize = Callable[[torch.Tensor, int], torch.Tensor]
"""(N, 3, S, S) float32 and a side in pixels -> (N, 3, side, side)."""


def antialiased(images: torch.Tensor, size: int) -> torch.Tensor:
    """Returns images of side `size`: bilinear, antialiased when they shrink."""
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def aligned(images: torch.Tensor, size: int) -> torch.Tensor:
    """Returns images of side `size`: bilinear with aligned corners, not antialiased, as the released Eagle models."""
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=True)


class VisionEncoder(nn.Module, ABC):
    """A vision encoder with a declared input size, output grid and channels.

    It resizes and normalizes on the device with its own statistics, so that a mixture never asks
    "whose image processor?".

    Args:
        input_size: side of its input in pixels.
        grid: G, side of its output grid.
        channels: C, channels of its features.
        placeholder_size: side in pixels of the smallest image that reaches every parameter.
        mean, std: RGB statistics of its input, in 0..1.
        resize: from the tile's side to `input_size`.
        recompute: whether an engine with activation checkpointing recomputes this encoder too.
    """

    def __init__(
        self,
        *,
        input_size: int,
        grid: int,
        channels: int,
        placeholder_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize: Resize = antialiased,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.grid = grid
        self.channels = channels
        self.placeholder_size = placeholder_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.resize = resize
        self.recompute = recompute

    def forward(self, pixels: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """Returns features (N, C, G, G) of tiles (N, 3, S, S) uint8, in the encoder's dtype.

        Args:
            size: side in pixels it sees instead of `input_size`; the grid shrinks with it.
        """
        size = size or self.input_size
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        images = (pixels.float() / 255.0 - mean) / std
        if images.shape[-1] != size:
            images = self.resize(images, size)
        return self.encode(images.to(next(self.parameters()).dtype))

    @abstractmethod
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images (N, 3, s, s), s the input or placeholder size."""

    @abstractmethod
    def set_activation_checkpointing(self) -> None:
        """Recomputes activations in the backward pass instead of keeping them."""


def init_from_fan_in(module: nn.Module) -> None:
    """Draws every convolution and linear weight anew, with variance 1 / fan-in, and clears biases.

    For training from random weights: the libraries' fixed standard deviation of 0.02 suits layers of about
    2500 inputs; in narrow ones it leaves activations so small that GELU is a straight line, and nothing but
    colours is learnt for thousands of steps.

    Source: LeCun et al., Efficient BackProp, 1998.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
