"""Names of tensors in the released Eagle 1 checkpoints and in this model, both ways.

    released                                              here
    model.vision_tower.vision_towers.{i}.vision_tower.*   mixture.encoders.{i-th name}.*, by `Tower.renames`
    model.mm_projector.{0,2}.*                            projector.layers.{0,2}.*
    model.{embed_tokens,layers,norm}.*, lm_head.weight    llm.model.*, llm.lm_head.weight

i counts the towers in the order of `mm_vision_tower` in config.json, which differs between releases.

Source: NVlabs/Eagle, Eagle/ (facts only).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from eagle_train.model.checkpoints.eagle1_unused import clip_norm, convnext_head, eva02_tables, nothing
from eagle_train.model.checkpoints.names import (
    OLD_BUFFERS,
    Match,
    Renames,
    compare,
    matches_any,
    rename,
    reversed_renames,
)
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


def match(released: Mapping[str, torch.Size], ours: Mapping[str, torch.Size], towers: Mapping[str, Tower]) -> Match:
    """Returns how the tensors of a released checkpoint fit those of a model.

    Args:
        released, ours: shapes by name.
        towers: by the name of our encoder, in the order of `mm_vision_tower`.
    """
    return compare(
        released,
        ours,
        is_unused=partial(is_unused, towers=towers),
        to_ours=partial(to_ours, towers=towers),
        to_released=partial(to_released, towers=towers),
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
            return TOWER.format(index) + rename(name.removeprefix(prefix), reversed_renames(tower.renames))
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
