"""Names of tensors in the released Qwen2-VL checkpoints and in this model, both ways.

    released                          here
    visual.patch_embed.proj.weight    mixture.encoders.qwen2_vit.patch_embed.weight
    visual.blocks.*                   mixture.encoders.qwen2_vit.blocks.*
    visual.merger.{ln_q,mlp}.*        projector.{norm,layers}.*
    model.*, lm_head.weight           llm.model.*, llm.lm_head.weight

A tied LM head is absent from a release, or a second copy of the embeddings that some training codes write.
`state_dict()` of transformers 5 has other names than its files; these are the files'.

Source: Qwen/Qwen2-VL-2B-Instruct and -7B-Instruct, as transformers reads and writes them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from eagle_train.model.checkpoints.files import same
from eagle_train.model.checkpoints.names import OLD_BUFFERS, Match, compare, matches_any, rename, reversed_renames

ENCODER = "qwen2_vit"
"""Name of the vision transformer in `mixture.encoders`."""
RENAMES = (
    ("visual.patch_embed.proj.*", f"mixture.encoders.{ENCODER}.patch_embed.*"),
    ("visual.blocks.*", f"mixture.encoders.{ENCODER}.blocks.*"),
    ("visual.merger.ln_q.*", "projector.norm.*"),
    ("visual.merger.mlp.*", "projector.layers.*"),
    ("model.*", "llm.model.*"),
    ("lm_head.*", "llm.lm_head.*"),
)
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"


def is_tied(weights: Mapping[str, torch.Tensor], declared: bool) -> bool:
    """Returns whether the LM head of a checkpoint is its table of embeddings: it is absent, or the same as declared."""
    return HEAD not in weights or (declared and same(weights[HEAD], weights[EMBEDDINGS]))


def match(released: Mapping[str, torch.Size], ours: Mapping[str, torch.Size], *, tied: bool) -> Match:
    """Returns how the tensors of a released checkpoint fit those of a model.

    Args:
        released, ours: shapes by name; ours without the head if it is tied.
        tied: whether the LM head is the table of embeddings; a second copy of it is not used.
    """
    return compare(
        released,
        ours,
        is_unused=lambda key: (tied and key == HEAD) or matches_any(key, OLD_BUFFERS),
        to_ours=to_ours,
        to_released=to_released,
    )


def to_ours(key: str) -> str:
    """Returns our name of a released tensor; of one that the layout does not know, a name that no model has."""
    name = rename(key, RENAMES)
    return name if name != key else f"unknown.{key}"


def to_released(name: str) -> str:
    """Returns the released name of one of our tensors.

    Raises:
        ValueError: if the layout has no place for it.
    """
    key = rename(name, reversed_renames(RENAMES))
    if key == name:
        raise ValueError(f"the released layout has no place for {name}")
    return key
