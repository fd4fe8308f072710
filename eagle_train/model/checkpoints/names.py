"""Names of tensors in a published layout and in this model, both ways, and how well the two fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from eagle_train.model.checkpoints.files import listed

OLD_BUFFERS = ("*.rotary_emb.inv_freq", "*.embeddings.position_ids")
"""Constants that older transformers releases wrote into checkpoints."""

Renames = Sequence[tuple[str, str]]
"""(released pattern, our pattern): `{}` stands for one part of a dotted name, a final `*` for the rest. The first
pattern that matches counts, in both directions."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """How a released checkpoint fits a model, tensor by tensor; all but `names` hold released names."""

    names: dict[str, str]
    """Released name -> our name, of the tensors that both have."""
    unused: list[str]
    """Harmless: of parts that no forward pass uses, or constants."""
    unknown: list[str]
    """Fatal: tensors without a place in the model."""
    missing: list[str]
    """Fatal: tensors of the model that the checkpoint does not hold."""
    misshapen: list[str]
    """Fatal: tensors of another shape, with both shapes."""

    def demand(self) -> None:
        """Raises ValueError if something fatal was found, with the names."""
        kinds = {"missing": self.missing, "without a place in the model": self.unknown, "misshapen": self.misshapen}
        if faults := [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]:
            raise ValueError(f"the checkpoint does not fit the model: {'; '.join(faults)}")


def compare(
    released: Mapping[str, torch.Size],
    ours: Mapping[str, torch.Size],
    *,
    is_unused: Callable[[str], bool],
    to_ours: Callable[[str], str],
    to_released: Callable[[str], str],
) -> Match:
    """Returns how the tensors of a released checkpoint fit those of a model.

    Args:
        released, ours: shapes by name.
        is_unused: of a released name.
        to_ours, to_released: the other side's name of a tensor.
    """
    unused = [key for key in released if is_unused(key)]
    names = {key: to_ours(key) for key in released.keys() - set(unused)}
    known = {key: name for key, name in names.items() if name in ours}
    return Match(
        names={key: known[key] for key in released if key in known and released[key] == ours[known[key]]},
        unused=unused,
        unknown=sorted(names.keys() - known.keys()),
        missing=sorted(to_released(name) for name in ours.keys() - set(known.values())),
        misshapen=sorted(
            f"{key} {tuple(released[key])} instead of {tuple(ours[name])}"
            for key, name in known.items()
            if released[key] != ours[name]
        ),
    )


def rename(name: str, renames: Renames) -> str:
    """Returns `name` by the first pattern that matches it, or as it is."""
    for source, target in renames:
        if found := expression(source).fullmatch(name):
            return target.replace("*", "{}").format(*found.groups())
    return name


def reversed_renames(renames: Renames) -> Renames:
    """Returns the renames of the other direction."""
    return [(ours, theirs) for theirs, ours in renames]


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether one of the patterns matches all of `name`."""
    return any(expression(pattern).fullmatch(name) for pattern in patterns)


@cache
def expression(pattern: str) -> re.Pattern:
    """Returns the regular expression of a pattern of `Renames`."""
    return re.compile(re.escape(pattern).replace(r"\{\}", "([^.]+)").replace(r"\*", "(.+)"))
