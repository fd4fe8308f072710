"""From encoder features to LLM embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from eagle_train.model.encoders.base import below


class MlpProjector(nn.Module):
    """Linear layers with GELU between: `mlp{depth}x_gelu`.

    Args:
        in_channels: C of the mixture.
        hidden_size: H of the LLM.
        depth: number of linear layers.
        layer_norm: normalizes its input first (Eagle 2's connector).
        pretrained: where its weights come from: LLaVA's `mm_projector.bin` or its folder. Only kept here:
            whoever builds a run reads it and loads what `adapt` returns.

    Source: LLaVA-1.5 and Eagle 1 (`mlp2x_gelu`: Linear, exact GELU, Linear, with biases).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        *,
        depth: int = 2,
        layer_norm: bool = False,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        layers: list[nn.Module] = [nn.LayerNorm(in_channels)] if layer_norm else []
        layers.append(nn.Linear(in_channels, hidden_size))
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns (..., H) embeddings of (..., C) features."""
        return self.layers(features)

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the projector's tensors of a LLaVA checkpoint, `...mm_projector.{0,2}.*`, under our names."""
        pieces = {name.rpartition("mm_projector."): tensor for name, tensor in state.items()}
        return {f"layers.{name}": tensor for (_, found, name), tensor in pieces.items() if found}


class PatchMerger(nn.Module):
    """Patches that stand side by side in a token are each normalized, then mapped together by two linear layers.

    Args:
        in_channels: C of the mixture: those of all patches of a token.
        hidden_size: H of the LLM.
        patches: how many patches a token has.
        pretrained: where its weights come from: a Qwen2-VL checkpoint. Only kept here, see `MlpProjector`.

    Source: Qwen2-VL (arXiv 2409.12191); transformers, `Qwen2VL`'s class of the same name.
    """

    def __init__(self, in_channels: int, hidden_size: int, *, patches: int = 4, pretrained: str | None = None) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.patches = patches
        self.norm = nn.LayerNorm(in_channels // patches, eps=1e-6)
        self.layers = nn.Sequential(nn.Linear(in_channels, in_channels), nn.GELU(), nn.Linear(in_channels, hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns (..., H) embeddings of (..., C) features."""
        return self.layers(self.norm(features.unflatten(-1, (self.patches, -1))).flatten(-2))

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the merger's tensors of a Qwen2-VL checkpoint under our names."""
        tensors = below(state, "visual.merger.", landmark="ln_q.weight")
        renamed = {n.replace("ln_q.", "norm.").replace("mlp.", "layers."): tensor for n, tensor in tensors.items()}
        return {name: tensor for name, tensor in renamed.items() if name in self.state_dict()}
