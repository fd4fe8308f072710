"""Encoders that feed one of them between its layers: LLaVA-HR's mixture-of-resolution adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from eagle_train.model.encoders.base import VisionEncoder
from eagle_train.model.encoders.staged import StagedEncoder
from eagle_train.model.geometry import GeometryError
from eagle_train.model.mixtures.anchored import AnchoredMixture
from eagle_train.model.mixtures.base import eval_if_frozen, run


class MixtureAdapter(AnchoredMixture):
    """A base encoder into which the others' features are injected between its stages and after the last.

    The base's layers are split into `stages` of nearly equal depth. After each stage but the last, a
    `ResolutionAdapter` changes its features x by the sources' features h_j on its grid; in the end they are
    joined (A, B_j linear, with biases):

        y = A x + sum_j B_j h_j

    LLaVA-HR has one source, a ConvNeXt, and four stages. Here every source has an f_h, a gate and a B_j of its
    own, and is resampled before f_h instead of after it, which costs less when it is the finer one.

    Args:
        encoders: by name.
        base: name of the encoder that makes the tokens; it must be a `StagedEncoder`.
        stages: number of parts the base's layers are split into.
        layer_norm, micro_batch: see `Mixture`; sources are normalized before they are injected.

    Raises:
        GeometryError: for more stages than the base has layers.
        ValueError: for a base that is missing, alone, or cannot be stopped between layers.

    Source: LLaVA-HR (arXiv 2403.03003), mixture-of-resolution adapter, and its released code (facts only);
    one of the fusions that Eagle (arXiv 2408.15998) compares.
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, VisionEncoder],
        base: str,
        stages: int = 4,
        layer_norm: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        grids = dict.fromkeys(encoders, encoders[base].grid) if base in encoders else {}
        super().__init__(encoders=encoders, base=base, grids=grids, layer_norm=layer_norm, micro_batch=micro_batch)
        anchor = encoders[base]
        if not isinstance(anchor, StagedEncoder):
            raise ValueError(f"base {base!r} is a {type(anchor).__name__}, which cannot be fed between its layers")
        depth = len(anchor.layers)
        if not 1 <= stages <= depth:
            reason = f"the {depth} layers of base {base!r} do not make {stages} stages"
            raise GeometryError(reason, nearest=[min(max(stages, 1), depth)], argument="stages")
        self.borders = [depth * stage // stages for stage in range(stages + 1)]
        widths = {name: encoders[name].channels for name in self.sources}
        self.adapters = nn.ModuleList(ResolutionAdapter(anchor.channels, widths) for _ in range(stages - 1))
        self.join = nn.ModuleDict({name: nn.Linear(e.channels, anchor.channels) for name, e in encoders.items()})

    def encode(self, pixels: torch.Tensor, *, placeholder: bool = False) -> dict[str, torch.Tensor]:
        """Returns the base's features after its last stage and the sources', all (N, C_i, G, G).

        Sources are on the base's grid and normalized.
        """
        anchor = self.encoders[self.base]
        eval_if_frozen(anchor)  # no `run`: the adapters inside may learn although the base does not
        size = anchor.placeholder_size if placeholder else anchor.input_size
        features = anchor.embed(anchor.normalize(pixels, size))
        sources = {}
        for name in self.sources:
            encoder = self.encoders[name]
            seen = run(encoder, pixels, encoder.placeholder_size if placeholder else None)
            tokens = self.tokens(name, seen, features.shape[-1])
            sources[name] = tokens.transpose(1, 2).unflatten(2, features.shape[2:])
        layers = list(anchor.layers)
        for stage, (first, last) in enumerate(zip(self.borders[:-1], self.borders[1:], strict=True)):
            features = anchor.advance(features, layers[first:last])
            if stage < len(self.adapters):
                features = self.adapters[stage](features, sources)
        return {self.base: features, **sources}

    def fuse(self, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns (N, G * G, C), row-major, of the maps that `encode` gives."""
        base = maps[self.base]
        joined = self.join[self.base](self.tokens(self.base, base, base.shape[-1]))
        for name in self.sources:
            joined = joined + self.join[name](maps[name].flatten(2).transpose(1, 2))
        return joined


class ResolutionAdapter(nn.Module):
    """Changes features x (N, C, G, G) by those of other encoders, h_j (N, C_j, G, G); at first not at all.

        x' = x + f_l(x)                          f_l: depthwise 7x7 convolution, GELU, 1x1 convolution
        y  = x' + sum_j tanh(g_j) f_h,j(h_j)     f_h: 1x1 convolution, GELU, 1x1 convolution
        g_j = w2 GELU(W1 [mean x'; mean f_h,j(h_j)] + b1) + b2       means over the grid; g_j is one number

    The last layers of f_l and f_h start at zero, so that a pretrained base starts as it was.

    Args:
        channels: C.
        widths: C_j by name.

    Source: as `MixtureAdapter`; the paper gates every channel, the released code, as here, the whole.
    """

    def __init__(self, channels: int, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.local = two_layers(nn.Conv2d(channels, channels, 7, padding=3, groups=channels), channels)
        self.inject = nn.ModuleDict(
            {name: two_layers(nn.Conv2d(width, width, 1), channels) for name, width in widths.items()}
        )
        self.gates = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(2 * channels, channels // 2), nn.GELU(), nn.Linear(channels // 2, 1))
                for name in widths
            }
        )

    def forward(self, features: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the changed features (N, C, G, G)."""
        features = features + self.local(features)
        changed = features
        for name, gate in self.gates.items():
            injected = self.inject[name](sources[name])
            means = torch.cat([features.mean(dim=(2, 3)), injected.mean(dim=(2, 3))], dim=1)
            changed = changed + gate(means).tanh()[..., None, None] * injected
        return changed


def two_layers(first: nn.Conv2d, channels: int) -> nn.Sequential:
    """Returns `first`, GELU and a 1x1 convolution to `channels` that starts at zero."""
    last = nn.Conv2d(first.out_channels, channels, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.GELU(), last)
