"""What a row costs, from FLOPs counted on the meta device, so that rows and steps can be made alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from eagle_train.data.balance import CostModel
from eagle_train.model.describe import MixtureGeometry
from eagle_train.model.flops import count_flops, llm_flops, target_flops
from eagle_train.model.lora import is_adapter
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.schedule import Stage

SHORT, LONG = 64, 128
"""Two lengths tell the linear from the quadratic part of the LLM's FLOPs."""
DIGITS = 4
"""Significant digits that are kept; the last ones would tie a plan to the version of a library's counter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardFlops:
    """FLOPs of a forward pass."""

    per_token: float
    per_token_squared: float
    """Causal attention: half the square."""
    per_target: float
    """Of a token with a label, besides."""
    encoders: Mapping[str, int]
    """Per tile."""
    fusion: int
    """Per tile, mixture and projector."""
    encoder_pairs: Mapping[str, int] = field(default_factory=dict)
    """Per two tiles of one picture or step in time, of encoders of native resolution."""
    adapted: frozenset[str] = frozenset()
    """The LLM and encoders, as `llm` and `mixture.encoders.NAME`, whose own weights are frozen below adapters."""


def forward_flops(model: VisionLanguageModel, geometry: MixtureGeometry) -> ForwardFlops:
    """Returns the FLOPs of a model's parts.

    Args:
        model: on the meta device.
        geometry: of its mixture.
    """
    short, long = llm_flops(model.llm, SHORT) / SHORT, llm_flops(model.llm, LONG) / LONG
    slope = (long - short) / (LONG - SHORT)
    per_target = target_flops(model.llm)
    tokens = torch.zeros(1, geometry.tokens_per_tile, geometry.channels, device="meta")
    return ForwardFlops(
        per_token=short - slope * SHORT - per_target,
        per_token_squared=slope / 2,
        per_target=per_target,
        encoders={name: encoder.flops for name, encoder in geometry.encoders.items()},
        fusion=geometry.fusion_flops + count_flops(model.projector, tokens),
        encoder_pairs={name: encoder.flops_per_pair for name, encoder in geometry.encoders.items()},
        adapted=frozenset(
            module
            for module in ["llm", *(f"mixture.encoders.{name}" for name in geometry.encoders)]
            if any(is_adapter(name) for name, _ in model.get_submodule(module).named_parameters())
        ),
    )


def cost_model(flops: ForwardFlops, stage: Stage) -> CostModel:
    """Returns what samples cost in a stage, forward and backward.

    The backward pass takes twice the forward one where weights are trained, once where gradients only pass through
    them (a frozen LLM behind a projector that learns, weights below adapters), and nothing for a frozen encoder.
    Attention scores have no weights: wherever gradients pass, their backward pass takes twice the forward one.
    """

    def of_encoders(each: Mapping[str, int], weights: bool) -> int:
        names = {name: f"mixture.encoders.{name}" for name in each if stage.align in (None, name)}
        return sum(each[name] * passes(flops, stage, module, weights=weights) for name, module in names.items())

    of_llm = max(2, passes(flops, stage, "llm", weights=True))
    return CostModel(
        per_token=rounded(of_llm * flops.per_token),
        per_token_squared=rounded(3 * flops.per_token_squared),
        per_target=rounded(of_llm * flops.per_target),
        per_tile=rounded(of_encoders(flops.encoders, weights=True) + 3 * flops.fusion),
        per_tile_pair=rounded(of_encoders(flops.encoder_pairs, weights=False)),
    )


def passes(flops: ForwardFlops, stage: Stage, module: str, *, weights: bool) -> int:
    """Returns what a module's forward and backward pass take, in forward passes, where no gradient need pass it.

    Args:
        weights: whether of its products with weights, or of those of attention.
    """
    if not is_trained(stage, module):
        return 1
    return 2 if weights and module in flops.adapted else 3


def is_trained(stage: Stage, module: str) -> bool:
    """Returns whether a stage trains a module, by the longest prefix of its name, or a part of it."""
    parts = [rate for name, rate in stage.learning_rates.items() if name.startswith(f"{module}.")]
    names = [name for name in stage.learning_rates if f"{module}.".startswith(f"{name}.")]
    own = stage.learning_rates[max(names, key=len)] if names else None
    return own is not None or any(rate is not None for rate in parts)


def rounded(value: float) -> float:
    """Returns a number with `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")
