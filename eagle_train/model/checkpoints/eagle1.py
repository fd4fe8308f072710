"""Names of tensors in the released Eagle 1 checkpoints and in this model, both ways.

    released                                              here
    model.vision_tower.vision_towers.{i}.vision_tower.*   mixture.encoders.{i-th name}.*, by `Tower.renames`
    model.mm_projector.{0,2}.*                            projector.layers.{0,2}.*
    model.{embed_tokens,layers,norm}.*, lm_head.weight    llm.model.*, llm.lm_head.weight

i counts the towers in the order of `mm_vision_tower` in config.json, which differs between releases.

Source: NVlabs/Eagle, Eagle/ (facts only).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from eagle_train.model.checkpoints.eagle1_unused import clip_norm, convnext_head, eva02_tables, nothing
from eagle_train.model.checkpoints.files import listed
from eagle_train.model.encoders.base import VisionEncoder
from eagle_train.model.encoders.clip_vit import ClipVit
from eagle_train.model.encoders.convnext import ConvNext
from eagle_train.model.encoders.eva02 import Eva02
from eagle_train.model.encoders.pix2struct import Pix2Struct
from eagle_train.model.encoders.sam import Sam

TOWER = "model.vision_tower.vision_towers.{}.vision_tower."
PROJECTOR = ("model.mm_projector.", "projector.layers.")
ENCODER = "mixture.encoders.{}."
LLM = "llm."
OLD_BUFFERS = ("*.rotary_emb.inv_freq", "*.embeddings.position_ids")
"""Constants that older transformers releases wrote into checkpoints."""

Renames = Sequence[tuple[str, str]]
"""(released pattern, our pattern): `{}` stands for one part of a dotted name, a final `*` for the rest. The first
pattern that matches counts, in both directions."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """One kind of vision encoder of the released models.

    Args:
        released: name in `mm_vision_tower`.
        name: in `mixture.encoders` of our configs.
        encoder: the class that runs it here.
        input_size: pixels.
        channels: of its features.
        num_parameters: that are used.
        renames: of the tensors that are used.
        unused: patterns of released tensors that no forward pass uses, or that are constants.
        make_unused: those tensors, from the tower's others by released name.
    """

    released: str
    name: str
    encoder: type[VisionEncoder]
    input_size: int
    channels: int
    num_parameters: int
    renames: Renames
    unused: tuple[str, ...] = ()
    make_unused: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] = nothing


TOWERS = (
    Tower(
        released="clip-448",  # yet it runs at 336
        name="clip",
        encoder=ClipVit,
        input_size=336,
        channels=1024,
        num_parameters=303_505_408,
        renames=(("vision_model.*", "vit.*"),),
        unused=("vision_model.post_layernorm.*",),
        make_unused=clip_norm,
    ),
    Tower(
        released="convnext-1024",
        name="convnext",
        encoder=ConvNext,
        input_size=1024,
        channels=3072,
        num_parameters=843_391_872,
        renames=(("stages.{}.blocks.{}.weight", "stages.{}.blocks.{}.gamma"),),
        unused=("head.*",),
        make_unused=convnext_head,
    ),
    Tower(
        released="sam-1024",
        name="sam",
        encoder=Sam,
        input_size=1024,
        channels=1024,
        num_parameters=307_687_936,
        renames=(("*", "sam.*"),),
    ),
    Tower(
        released="det-1024",
        name="det",
        encoder=Eva02,
        input_size=1024,
        channels=1024,
        num_parameters=303_388_608,
        renames=(
            ("blocks.{}.attn.q_bias", "blocks.{}.attn.q_proj.bias"),
            ("blocks.{}.attn.v_bias", "blocks.{}.attn.v_proj.bias"),
            ("blocks.{}.mlp.w1.*", "blocks.{}.mlp.fc1_g.*"),
            ("blocks.{}.mlp.w2.*", "blocks.{}.mlp.fc1_x.*"),
            ("blocks.{}.mlp.w3.*", "blocks.{}.mlp.fc2.*"),
            ("blocks.{}.mlp.ffn_ln.*", "blocks.{}.mlp.norm.*"),
        ),
        unused=("rope_win.*", "rope_glb.*", "blocks.{}.attn.rope.*"),  # tables, stored once per block and again
        make_unused=eva02_tables,
    ),
    Tower(
        released="pix2struct-1024",
        name="pix2struct",
        encoder=Pix2Struct,
        input_size=720,
        channels=1536,
        num_parameters=512_812_032,
        renames=(("*", "vit.*"),),
    ),
)


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


def match(released: Mapping[str, torch.Size], ours: Mapping[str, torch.Size], towers: Mapping[str, Tower]) -> Match:
    """Returns how the tensors of a released checkpoint fit those of a model.

    Args:
        released, ours: shapes by name.
        towers: by the name of our encoder, in the order of `mm_vision_tower`.
    """
    unused = [key for key in released if is_unused(key, towers)]
    names = {key: to_ours(key, towers) for key in released.keys() - set(unused)}
    known = {key: name for key, name in names.items() if name in ours}
    return Match(
        names={key: known[key] for key in released if key in known and released[key] == ours[known[key]]},
        unused=unused,
        unknown=sorted(names.keys() - known.keys()),
        missing=sorted(to_released(name, towers) for name in ours.keys() - set(known.values())),
        misshapen=sorted(
            f"{key} {tuple(released[key])} instead of {tuple(ours[name])}"
            for key, name in known.items()
            if released[key] != ours[name]
        ),
    )


def is_unused(key: str, towers: Mapping[str, Tower]) -> bool:
    """Returns whether a released tensor is a constant or belongs to a part that no forward pass uses."""
    for index, tower in enumerate(towers.values()):
        prefix = TOWER.format(index)
        if key.startswith(prefix) and matches_any(key.removeprefix(prefix), tower.unused):
            return True
    return matches_any(key, OLD_BUFFERS)


def to_ours(key: str, towers: Mapping[str, Tower]) -> str:
    """Returns our name of a released tensor."""
    for index, (name, tower) in enumerate(towers.items()):
        prefix = TOWER.format(index)
        if key.startswith(prefix):
            return ENCODER.format(name) + rename(key.removeprefix(prefix), tower.renames)
    if key.startswith(PROJECTOR[0]):
        return PROJECTOR[1] + key.removeprefix(PROJECTOR[0])
    return LLM + key


def to_released(name: str, towers: Mapping[str, Tower]) -> str:
    """Returns the released name of one of our tensors.

    Raises:
        ValueError: if the layout has no place for it.
    """
    for index, (encoder, tower) in enumerate(towers.items()):
        prefix = ENCODER.format(encoder)
        if name.startswith(prefix):
            renames = [(ours, theirs) for theirs, ours in tower.renames]
            return TOWER.format(index) + rename(name.removeprefix(prefix), renames)
    if name.startswith(PROJECTOR[1]):
        return PROJECTOR[0] + name.removeprefix(PROJECTOR[1])
    if name.startswith(LLM):
        return name.removeprefix(LLM)
    raise ValueError(f"the released layout has no place for {name}")


def unused_parts(released: Mapping[str, torch.Tensor], towers: Mapping[str, Tower]) -> dict[str, torch.Tensor]:
    """Returns the tensors that the original code also expects, for a checkpoint that holds all the others."""
    parts = {}
    for index, tower in enumerate(towers.values()):
        prefix = TOWER.format(index)
        own = {key.removeprefix(prefix): tensor for key, tensor in released.items() if key.startswith(prefix)}
        parts |= {prefix + key: tensor for key, tensor in tower.make_unused(own).items()}
    return parts


def rename(name: str, renames: Renames) -> str:
    """Returns `name` by the first pattern that matches it, or as it is."""
    for source, target in renames:
        if found := expression(source).fullmatch(name):
            return target.replace("*", "{}").format(*found.groups())
    return name


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether one of the patterns matches all of `name`."""
    return any(expression(pattern).fullmatch(name) for pattern in patterns)


@cache
def expression(pattern: str) -> re.Pattern:
    """Returns the regular expression of a pattern of `Renames`."""
    return re.compile(re.escape(pattern).replace(r"\{\}", "([^.]+)").replace(r"\*", "(.+)"))
