"""What every vision encoder is, and the preparation of images and of pretrained weights that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

Resize = Callable[[torch.Tensor, int], torch.Tensor]
"""Images or features (N, C, S, S) float32 and a side -> (N, C, side, side)."""


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
        recompute: whether an engine with activation checkpointing recomputes this encoder's layers too.
        pretrained: where its weights come from: a hub id, a local folder or a file; None: random weights.
            Only kept here: whoever builds a run reads it and loads what `adapt` returns.
        fresh: prefixes of the parameter names that such weights do not hold.
        not_built: parameters of the published model's parts that would never be used, by part.
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
        pretrained: str | None = None,
        fresh: tuple[str, ...] = (),
        not_built: Mapping[str, int] | None = None,
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
        self.pretrained = pretrained
        self.fresh = fresh
        self.not_built = dict(not_built or {})

    def forward(self, pixels: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """Returns features (N, C, G, G) of tiles (N, 3, S, S) uint8, in the encoder's dtype.

        Args:
            size: side in pixels it sees instead of `input_size`; the grid shrinks with it.
        """
        return self.encode(self.normalize(pixels, size or self.input_size))

    def normalize(self, pixels: torch.Tensor, size: int) -> torch.Tensor:
        """Returns the input (N, 3, size, size), in the encoder's dtype, that tiles (N, 3, S, S) uint8 make."""
        mean, std = (per_channel(values, pixels) for values in (self.mean, self.std))
        images = (pixels.float() / 255.0 - mean) / std
        if images.shape[-1] != size:
            images = self.resize(images, size)
        return images.to(next(self.parameters()).dtype)

    @abstractmethod
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images (N, 3, s, s), s the input or placeholder size."""

    @abstractmethod
    def set_activation_checkpointing(self) -> None:
        """Recomputes activations in the backward pass instead of keeping them."""

    @abstractmethod
    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the library's tensors under this module's own names and in its shapes.

        What a complete checkpoint does not give is `fresh`; tensors of parts that are not built are left out.

        Args:
            state: tensors of the published checkpoint, by the names that it has on the hub.
        """

    def known(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns those of `tensors` that this module has and that are not `fresh`."""
        names = self.state_dict().keys()
        return {n: tensor for n, tensor in tensors.items() if n in names and not n.startswith(self.fresh)}


def per_channel(values: Sequence[float], pixels: torch.Tensor) -> torch.Tensor:
    """Returns (3, 1, ...) float32 beside pixels (N, 3, ...); a GPU is not waited for."""
    return torch.tensor(values).to(pixels.device, non_blocking=True).view(3, *[1] * (pixels.dim() - 2))


def below(state: Mapping[str, torch.Tensor], prefix: str, *, landmark: str) -> dict[str, torch.Tensor]:
    """Returns the tensors whose names begin with `prefix`, without it; all, where the bare model was saved.

    Args:
        landmark: name of a tensor of the bare model; if it is not found behind `prefix`, there is no prefix.
    """
    prefix = prefix if prefix + landmark in state else ""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


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
