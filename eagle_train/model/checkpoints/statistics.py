"""Mean and standard deviation by which pixels are normalized, and a first layer moved from one pair to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A pixel p, in 0..1, of a channel is given to an encoder as (p - mean) / std."""

    mean: tuple[float, float, float]
    """RGB."""
    std: tuple[float, float, float]
    """RGB."""


IMAGENET = Statistics(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""Source: torchvision, `ImageClassification`."""


def read_statistics(preprocessor: Mapping[str, Any]) -> dict[str, list[float]]:
    """Returns an encoder's `mean` and `std`, as far as a `preprocessor_config.json` tells."""
    names = {"mean": "image_mean", "std": "image_std"}
    return {ours: preprocessor[theirs] for ours, theirs in names.items() if theirs in preprocessor}


def renormalized(
    weight: torch.Tensor, bias: torch.Tensor, *, before: Statistics, after: Statistics
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weight and bias that give, of pixels normalized by `after`, what the given ones give of `before`.

    (p - m) / s = (s' x + m' - m) / s for x = (p - m') / s'. So it must hold for every pixel that the layer sees: it is
    exact for a convolution without padding, to rounding in the dtype of the weights.

    Args:
        weight: of the convolution, (C, 3, P, P), any floating dtype.
        bias: (C,), the same dtype.
    """
    if before == after:
        return weight, bias
    old_mean, old_std, new_mean, new_std = (
        torch.tensor(values, dtype=torch.float64) for values in (before.mean, before.std, after.mean, after.std)
    )
    exact = weight.double()
    shift = exact.sum(dim=(2, 3)) @ ((new_mean - old_mean) / old_std)  # (C,)
    scaled = exact * (new_std / old_std).view(1, 3, 1, 1)
    return scaled.to(weight.dtype), (bias.double() + shift).to(bias.dtype)
