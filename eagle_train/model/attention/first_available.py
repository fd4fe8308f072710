"""The fastest kernel that can run here, of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from eagle_train.model.attention.backend import AttentionBackend, Segments
from eagle_train.model.attention.limits import computed_dtype, name_of


class Candidate(AttentionBackend, Protocol):
    """A backend that says beforehand where it cannot run."""

    def refusal(self, query: torch.Tensor) -> str | None:
        """Returns why queries (T, heads, head_dim) cannot be computed, None where they can."""


class FirstAvailable:
    """The first of several backends that can compute what it is given: by device, dtype and head dimension.

    It chooses anew where these change, as in an evaluation on another device. As text, it is what it chose and why.

    Args:
        candidates: the fastest first.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = tuple(candidates)
        self.chosen: dict[tuple[torch.device, torch.dtype, int], Candidate] = {}
        """By device, dtype and head dimension."""
        self.reasons: list[str] = []
        """What was chosen, and why not what is faster."""

    def __str__(self) -> str:
        return " | ".join(self.reasons) or " or ".join(map(str, self.candidates))

    def choose(self, query: torch.Tensor) -> Candidate:
        """Returns what computes queries (T, heads, head_dim).

        Raises:
            ValueError: if no candidate can, with the reason of each.
        """
        kind = (query.device, computed_dtype(query), query.shape[-1])
        if kind not in self.chosen:
            refusals = []
            for candidate in self.candidates:
                reason = candidate.refusal(query)
                if reason is None:
                    self.chosen[kind] = candidate
                    what = f"{candidate} on {kind[0].type} in {name_of(kind[1])}"
                    self.reasons.append("; ".join([what, *refusals]))
                    break
                refusals.append(f"not {candidate}: {reason}")
            else:
                raise ValueError(
                    f"no attention can run: {'; '.join(refusals)}; set attention=auto, or attention=segments, which "
                    f"runs everywhere"
                )
        return self.chosen[kind]

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        *,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        """Returns attention within each segment, (T, heads, head_dim); see `AttentionBackend`."""
        return self.choose(query)(query, key, value, segments, scale=scale, causal=causal)
