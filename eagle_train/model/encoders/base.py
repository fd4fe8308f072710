"""What every vision encoder is, and the resize and normalization they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class VisionEncoder(nn.Module, ABC):
    """A vision encoder with a declared input size, output grid and channels.

    It resizes and normalizes on the device with its own statistics, so that a mixture never asks
    "whose image processor?".

    Args:
        input_size: side of its input in pixels.
        grid: side of its output grid.
        channels: C, channels of its features.
        mean, std: RGB statistics of its pretraining, in 0..1.
    """

    def __init__(
        self, *, input_size: int, grid: int, channels: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.grid = grid
        self.channels = channels
        self.mean = tuple(mean)
        self.std = tuple(std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of tiles (N, 3, S, S) uint8, in the encoder's dtype."""
        images = resize(pixels, self.input_size)
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        dtype = next(self.parameters()).dtype
        return self.encode(((images - mean) / std).to(dtype))

    @abstractmethod
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images (N, 3, input_size, input_size)."""

    @abstractmethod
    def set_activation_checkpointing(self) -> None:
        """Recomputes activations in the backward pass instead of keeping them."""


def resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Returns (N, 3, S, S) uint8 as float32 in 0..1 of side `size` (bilinear, antialiased)."""
    images = pixels.float() / 255.0
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


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
