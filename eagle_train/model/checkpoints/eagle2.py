"""Names of tensors in the released Eagle 2 and Eagle 2.5 checkpoints and in this model, both ways.

    released                                                    here
    vision_model.* (SigLIP alone)                               mixture.encoders.siglip.*, by `Tower.renames`
    vision_model.vision_model.vision_towers.{i}.vision_tower.*  mixture.encoders.{i-th name}.*, by `Tower.renames`
    mlp1.{0,1,3}.*                                              projector.layers.{0,1,3}.*
    language_model.*                                            llm.*

A SigLIP in a release is one of transformers 4, whose names begin with another `vision_model.`; transformers 5 dropped
it. A tied LM head may be absent from a release; here it is never stored twice.

Source: NVlabs/Eagle, Eagle2_5/; the remote code of nvidia/Eagle2-9B for several towers (facts only).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from eagle_train.model.checkpoints.files import same
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
from eagle_train.model.encoders.convnext import ConvNext
from eagle_train.model.encoders.siglip import Siglip

ALONE = "vision_model."
NUMBERED = "vision_model.vision_model.vision_towers.{}.vision_tower."
ENCODER = "mixture.encoders.{}."
PARTS = (("mlp1.", "projector.layers."), ("language_model.", "llm."))
"""(released prefix, ours) of what is no vision tower."""
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
POOLING_HEAD = "vision_model.head."
"""In a SigLIP tower."""
OLD_LAYER_SCALE = (("stages.{}.blocks.{}.weight", "stages.{}.blocks.{}.gamma"),)
"""ConvNeXt's layer scale where its code was changed so that transformers 4, which renames every `gamma`, reads it."""
FLAT_SIGLIP = (("*", "vit.*"),)
"""SigLIP as transformers 5 writes it."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """One kind of vision encoder of the released models.

    Args:
        released: name in `vision_path`.
        name: in `mixture.encoders` of our configs.
        encoder: the class that runs it here.
        renames: of the tensors that are used.
        unused: patterns of released tensors that no forward pass uses.
    """

    released: str
    name: str
    encoder: type[VisionEncoder]
    renames: Renames
    unused: tuple[str, ...]


SIGLIP = Tower(
    released="palisiglip",
    name="siglip",
    encoder=Siglip,
    renames=(("vision_model.*", "vit.*"),),
    # Attention pooling: SigLIP's own code always builds it, PaliGemma's towers lack it.
    unused=(f"{POOLING_HEAD}*",),
)
CONVNEXT = Tower(released="convnext-1024", name="convnext", encoder=ConvNext, renames=(), unused=("head.*",))
TOWERS = (SIGLIP, CONVNEXT)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a checkpoint's names depend on.

    Args:
        towers: by released prefix, in the order of the release.
        tied: whether the LM head is the table of embeddings.
    """

    towers: Mapping[str, Tower]
    tied: bool


def layout(towers: Sequence[Tower], *, tied: bool) -> Layout:
    """Returns the layout of towers in the order of `vision_path`; one SigLIP alone has a layout of its own."""
    if list(towers) == [SIGLIP]:
        return Layout(towers={ALONE: SIGLIP}, tied=tied)
    return Layout(towers={NUMBERED.format(index): tower for index, tower in enumerate(towers)}, tied=tied)


def as_written(known: Layout, keys: Collection[str]) -> Layout:
    """Returns a layout with the names that a checkpoint's own keys show, where libraries differ."""
    found = {}
    for prefix, tower in known.towers.items():
        if tower is SIGLIP and f"{prefix}embeddings.patch_embedding.weight" in keys:
            tower = replace(SIGLIP, renames=FLAT_SIGLIP, unused=("head.*",))
        if tower is CONVNEXT and f"{prefix}stages.0.blocks.0.weight" in keys:
            tower = with_old_layer_scale(CONVNEXT)
        found[prefix] = tower
    return replace(known, towers=found)


def with_old_layer_scale(tower: Tower) -> Tower:
    """Returns the ConvNeXt whose layer scale is named `weight`."""
    return replace(tower, renames=OLD_LAYER_SCALE)


def is_tied(weights: Mapping[str, torch.Tensor], declared: bool) -> bool:
    """Returns whether the LM head of a checkpoint is its table of embeddings.

    What is stored counts more than what the config declares: a head that is absent is tied, one that differs is not.
    """
    if HEAD not in weights:
        return True
    return declared and EMBEDDINGS in weights and same(weights[HEAD], weights[EMBEDDINGS])


def match(released: Mapping[str, torch.Size], ours: Mapping[str, torch.Size], known: Layout) -> Match:
    """Returns how the tensors of a released checkpoint fit those of a model.

    Args:
        released, ours: shapes by name; ours without the head if it is tied.
    """
    return compare(
        released,
        ours,
        is_unused=partial(is_unused, known=known),
        to_ours=partial(to_ours, known=known),
        to_released=partial(to_released, known=known),
    )


def is_unused(key: str, known: Layout) -> bool:
    """Returns whether a released tensor is a constant, a second copy, or of a part that no forward pass uses."""
    for prefix, tower in known.towers.items():
        if key.startswith(prefix) and matches_any(key.removeprefix(prefix), tower.unused):
            return True
    return (known.tied and key == HEAD) or matches_any(key, OLD_BUFFERS)


def to_ours(key: str, known: Layout) -> str:
    """Returns our name of a released tensor; of one that the layout does not know, a name that no model has."""
    for prefix, tower in known.towers.items():
        if key.startswith(prefix):
            return ENCODER.format(tower.name) + rename(key.removeprefix(prefix), tower.renames)
    for theirs, ours in PARTS:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return f"unknown.{key}"


def to_released(name: str, known: Layout) -> str:
    """Returns the released name of one of our tensors.

    Raises:
        ValueError: if the layout has no place for it.
    """
    for prefix, tower in known.towers.items():
        ours = ENCODER.format(tower.name)
        if name.startswith(ours):
            return prefix + rename(name.removeprefix(ours), reversed_renames(tower.renames))
    for theirs, ours in PARTS:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"the released layout has no place for {name}")
