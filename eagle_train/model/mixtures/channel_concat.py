"""Encoders side by side: channel concatenation, Eagle's fusion, and Eagle 2's with space-to-depth."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from eagle_train.model.encoders.base import Resize, VisionEncoder, aligned
from eagle_train.model.geometry import leading_encoder, whole_grid
from eagle_train.model.mixtures.base import Mixture


class ChannelConcat(Mixture):
    """Features of all encoders on one grid, concatenated on channels in config order.

    An encoder in `fold` enters on a grid that many times as fine, and each square of its tokens becomes one token of
    the common grid (`space_to_depth`). Eagle 2 folds SigLIP's 32x32 features by 2, to 16x16 tokens of four times the
    channels; MoVE concatenates them with ConvNeXt's 16x16.

    Args:
        encoders: by name; the order is that of the concatenation.
        grid: side of the common grid; tokens per tile are grid * grid. Null: the one that `leading_encoder` chooses
            of the encoders' own, which must be whole squares of `fold`.
        fold: side, in tokens, of the squares that become one token, by encoder name; 1 where it is not named.
        layer_norm, micro_batch, resample: see `Mixture`.

    Raises:
        GeometryError: if `grid` is null and an encoder's own is no whole number of squares.
        ValueError: if `fold` names an encoder that is not there, or is below 1.

    Source: Eagle (arXiv 2408.15998), channel concatenation; Eagle 2 (arXiv 2501.14818), MoVE.
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, VisionEncoder],
        grid: int | None = None,
        fold: Mapping[str, int] | None = None,
        layer_norm: bool = False,
        micro_batch: int | None = None,
        resample: Resize = aligned,
    ) -> None:
        if wrong := {name: side for name, side in (fold or {}).items() if name not in encoders or side < 1}:
            raise ValueError(f"fold gives {sorted(encoders)} a side of at least 1 each, not {wrong}")
        folds = dict.fromkeys(encoders, 1) | dict(fold or {})
        grid = common_grid(encoders, folds) if grid is None else grid
        super().__init__(
            encoders=encoders,
            grids={name: grid * side for name, side in folds.items()},
            tokens_per_tile=grid * grid,
            channels=sum(encoder.channels * folds[name] ** 2 for name, encoder in encoders.items()),
            layer_norm=layer_norm,
            micro_batch=micro_batch,
            resample=resample,
        )
        self.folds = folds

    def fuse(self, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns (N, grid * grid, C), row-major, of each encoder's features (N, C_i, G_i, G_i)."""
        return torch.cat(
            [space_to_depth(self.tokens(n, features, self.grids[n]), self.folds[n]) for n, features in maps.items()],
            dim=-1,
        )


def common_grid(encoders: Mapping[str, VisionEncoder], folds: Mapping[str, int]) -> int:
    """Returns the side of the grid of folded tokens that suits all encoders best; see `leading_encoder`.

    Raises:
        GeometryError: if an encoder's grid is no whole number of squares of its fold.
    """
    sizes = {}
    for name, encoder in encoders.items():
        patch_size, argument = encoder.input_size // encoder.grid, f"encoders.{name}.image_size"
        grid = whole_grid(encoder.input_size, patch_size, name=name, multiple=folds[name], argument=argument)
        sizes[name] = (encoder.input_size, grid // folds[name])
    return sizes[leading_encoder(sizes)][1]


def space_to_depth(tokens: torch.Tensor, fold: int) -> torch.Tensor:
    """Returns (N, (G / fold)**2, fold**2 * C) of row-major tokens (N, G * G, C): each square becomes one token.

    Within it the channels of the square's tokens stand row by row: with fold 2, token (r, q) is the concatenation of
    (2r, 2q), (2r, 2q+1), (2r+1, 2q), (2r+1, 2q+1).

    Source: the order of the released Eagle 2 models and of InternVL's `ps_version: v2`.
    """
    if fold == 1:
        return tokens
    grid = math.isqrt(tokens.shape[1]) // fold
    squares = tokens.unflatten(1, (grid, fold, grid, fold))  # (N, r, a, q, b, C)
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)
