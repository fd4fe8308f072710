"""Rotary embeddings that depend on length, in packed rows: each sample is turned as its own length says."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LONG_ROPE, DYNAMIC_ROPE = "longrope", "dynamic"
"""Types of a config's `rope_parameters`: Phi-3's with a context of 128K; InternLM2.5's, which is NTK-aware scaling."""


class SampleLongRope(nn.Module):
    """Rotary embedding with short factors for samples within the original context, and long factors beyond.

    transformers' own takes the factors of a call's largest position for all of it: in a packed row the longest sample
    would decide how its neighbours are turned, and a sample's loss would depend on what it is packed with.

    A sample begins wherever positions are 0; one without a beginning, as a token that continues cached ones, is as long
    as its last position says.

    Args:
        config: of an LLM whose `rope_parameters` are of type `longrope`.

    Source: LongRoPE (arXiv 2402.13753); transformers, `_compute_longrope_parameters`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.original_length: int = config.rope_parameters["original_max_position_embeddings"]
        frequencies = ROPE_INIT_FUNCTIONS[LONG_ROPE]
        short, self.scale = frequencies(config, seq_len=self.original_length)
        long, _ = frequencies(config, seq_len=self.original_length + 1)
        self.register_buffer("short", short, persistent=False)
        self.register_buffer("long", long, persistent=False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines (B, T, D) of the rotated channels D, in the dtype of `x`.

        Args:
            x: any tensor of the computation's dtype.
            position_ids: (B, T) int64; restart at 0 in every sample of a row.
        """
        beyond = lengths(position_ids) > self.original_length
        frequencies = torch.where(beyond[..., None], self.long.float(), self.short.float())
        return cosines_and_sines(position_ids, frequencies, self.scale, x.dtype)


class SampleDynamicRope(nn.Module):
    """Rotary embedding whose base grows with a sample's length, from the model's context on.

        base(L) = base * (factor L / context - factor + 1) ** (D / (D - 2))        L tokens, D rotated channels

    transformers' own takes the largest position of a call for all of it, and keeps the base of the longest call for
    later ones that are beyond the context too: a sample's loss would depend on what came before. Samples within the
    context are turned by the same bits as there. See `SampleLongRope` for where a sample begins.

    Args:
        config: of an LLM whose `rope_parameters` are of type `dynamic`.

    Source: transformers, `_compute_dynamic_ntk_parameters`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.context: int = config.max_position_embeddings
        self.factor: float = config.rope_parameters["factor"]
        frequencies, self.scale = ROPE_INIT_FUNCTIONS[DYNAMIC_ROPE](config, seq_len=self.context)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines (B, T, D), see `SampleLongRope`."""
        grown = (self.factor * lengths(position_ids).float() / self.context - (self.factor - 1.0)).clamp(min=1.0)
        channels = torch.arange(0, 2 * len(self.frequencies), 2, device=grown.device)  # 0, 2, ... D - 2
        frequencies = self.frequencies.float() * grown[..., None] ** (-channels / channels[-1])
        return cosines_and_sines(position_ids, frequencies, self.scale, x.dtype)


def cosines_and_sines(
    position_ids: torch.Tensor, frequencies: torch.Tensor, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and sines (B, T, D), times `scale`, of positions (B, T) with frequencies (B, T, D / 2)."""
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Returns of each token the length of its sample, (B, T), by the largest position in it.

    Args:
        position_ids: (B, T); [0, 1, 2, 0, 1] -> [3, 3, 3, 2, 2].
    """
    numbers = (position_ids == 0).cumsum(-1)  # 0: of tokens before the first beginning
    longest = torch.zeros_like(position_ids).scatter_reduce(-1, numbers - numbers[:, :1], position_ids, "amax")
    return longest.gather(-1, numbers - numbers[:, :1]) + 1


def turn_each_sample(llm: PreTrainedModel) -> None:
    """Gives a causal LM whose rotary embedding depends on length one that tells the samples of a row apart."""
    kinds = {LONG_ROPE: SampleLongRope, DYNAMIC_ROPE: SampleDynamicRope}
    kind = (llm.config.to_dict().get("rope_parameters") or {}).get("rope_type")
    if kind in kinds:
        llm.model.rotary_emb = kinds[kind](llm.config)


def has_long_rope(module: nn.Module) -> bool:
    """Returns whether a module turns samples by their length, whatever it is, which takes the whole row."""
    return any(isinstance(part, SampleLongRope) for part in module.modules())


def check_part(module: nn.Module, longest: int) -> None:
    """Refuses a part of a row whose samples are turned by a length that the part does not tell.

    Args:
        longest: tokens of the row's longest sample.

    Raises:
        ValueError: with the context, within which samples are turned alike.
    """
    for part in module.modules():
        if isinstance(part, SampleDynamicRope) and longest > part.context:
            raise ValueError(
                f"a sample of {longest} tokens is turned by all of its length, being longer than the LLM's context of "
                f"{part.context}; set engine.sequence_parallel=1 or shorten max_length"
            )
