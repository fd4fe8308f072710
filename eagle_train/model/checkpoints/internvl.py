"""Names of tensors in the published InternVL2 checkpoints, of both layouts, and in this model.

    original                            transformers, on disk                      here
    vision_model.*                      vision_tower.*, see `VISION`               mixture.encoders.intern_vit.*
    ...attn.qkv.*                       ...attention.{q,k,v}_proj.*                ...attn.qkv.*
    mlp1.{0,1,3}.*                      multi_modal_projector.{layer_norm,...}.*   projector.layers.{0,1,3}.*
    language_model.*                    language_model.*                           llm.*

In memory, and on disk where a later transformers wrote it, names of transformers' layout begin with another `model.`,
and the head stands beside it. An original InternLM2 is read as the Llama that it is, see `internlm2`.

Source: OpenGVLab/InternVL, `tools/internvl_custom2hf.py`, `modeling_internvl_chat.py` (facts only); transformers'
`InternVLForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from eagle_train.model.checkpoints import internlm2
from eagle_train.model.checkpoints.names import (
    OLD_BUFFERS,
    Match,
    Renames,
    compare,
    matches_any,
    rename,
    reversed_renames,
)

ENCODER = "intern_vit"
"""Name in `mixture.encoders` of our configs."""
LANGUAGE = "language_model."
EMBEDDINGS = f"{LANGUAGE}model.embed_tokens.weight"
HEAD = f"{LANGUAGE}lm_head.weight"
PARTS = (("vision_model.", f"mixture.encoders.{ENCODER}."), ("mlp1.", "projector.layers."), (LANGUAGE, "llm."))
"""(original prefix, ours)."""
TOWER, BRIDGE = "vision_tower.", "multi_modal_projector."
"""How names of transformers' layout begin, on disk; those of the LLM begin as in the original."""
VISION: Renames = (
    ("vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("vision_tower.embeddings.patch_embeddings.projection.{}", "vision_model.embeddings.patch_embedding.{}"),
    ("vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    (
        "vision_tower.encoder.layer.{}.attention.projection_layer.{}",
        "vision_model.encoder.layers.{}.attn.proj.{}",
    ),
    ("vision_tower.encoder.layer.{}.attention.q_norm.{}", "vision_model.encoder.layers.{}.attn.q_norm.{}"),
    ("vision_tower.encoder.layer.{}.attention.k_norm.{}", "vision_model.encoder.layers.{}.attn.k_norm.{}"),
    ("vision_tower.encoder.layer.{}.layernorm_before.{}", "vision_model.encoder.layers.{}.norm1.{}"),
    ("vision_tower.encoder.layer.{}.layernorm_after.{}", "vision_model.encoder.layers.{}.norm2.{}"),
    ("vision_tower.encoder.layer.{}.lambda_1", "vision_model.encoder.layers.{}.ls1"),
    ("vision_tower.encoder.layer.{}.lambda_2", "vision_model.encoder.layers.{}.ls2"),
    ("vision_tower.encoder.layer.{}.mlp.{}.{}", "vision_model.encoder.layers.{}.mlp.{}.{}"),
    ("multi_modal_projector.layer_norm.{}", "mlp1.0.{}"),
    ("multi_modal_projector.linear_1.{}", "mlp1.1.{}"),
    ("multi_modal_projector.linear_2.{}", "mlp1.3.{}"),
)
"""(name of transformers, original name), but for queries, keys and values."""
FUSED: Renames = (("vision_tower.encoder.layer.{}.attention.q_proj.{}", "vision_model.encoder.layers.{}.attn.qkv.{}"),)
"""The first of three tensors that are one in the original."""


def is_native(keys: Collection[str]) -> bool:
    """Returns whether a checkpoint has transformers' names, on disk or in memory."""
    return any(key.removeprefix("model.").startswith((TOWER, BRIDGE)) for key in keys)


def on_disk(key: str) -> str:
    """Returns a name of transformers' layout as it is on disk, of one that is that or of a model in memory."""
    if key == "lm_head.weight":
        return HEAD
    if key.startswith("model.language_model."):
        return key.replace("model.language_model.", f"{LANGUAGE}model.", 1)
    return key.removeprefix("model.")


def from_native(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns weights of transformers' layout under the original names; queries, keys and values become one tensor."""
    known = {on_disk(key): tensor for key, tensor in weights.items()}
    found = {}
    for key, tensor in known.items():
        rest = [key.replace(".q_proj.", f".{letter}_proj.") for letter in "kv"]
        fused = rename(key, FUSED)
        if fused != key and all(name in known for name in rest):
            found[fused] = torch.cat([tensor, *(known[name] for name in rest)])
        elif not (key.startswith(TOWER) and (".k_proj." in key or ".v_proj." in key)):
            found[rename(key, VISION)] = tensor
    return found


def to_native(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns weights of original names under those of transformers' layout on disk."""
    found = {}
    for key, tensor in weights.items():
        first = rename(key, reversed_renames(FUSED))
        if first == key:
            found[rename(key, reversed_renames(VISION))] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            found[first.replace(".q_proj.", f".{letter}_proj.")] = part
    return found


def with_llama(weights: Mapping[str, torch.Tensor], num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Returns original weights whose InternLM2 has Llama's names; see `internlm2.to_llama`."""
    llm, rest = apart(weights)
    return rest | together(internlm2.to_llama(llm, num_heads, num_kv_heads))


def with_internlm2(weights: Mapping[str, torch.Tensor], num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Returns original weights whose Llama has InternLM2's names; see `internlm2.from_llama`."""
    llm, rest = apart(weights)
    return rest | together(internlm2.from_llama(llm, num_heads, num_kv_heads))


def apart(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the LLM's weights by its own names, and the others."""
    llm = {key.removeprefix(LANGUAGE): tensor for key, tensor in weights.items() if key.startswith(LANGUAGE)}
    return llm, {key: tensor for key, tensor in weights.items() if not key.startswith(LANGUAGE)}


def together(llm: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the LLM's weights by their names in a checkpoint."""
    return {LANGUAGE + name: tensor for name, tensor in llm.items()}


def match(original: Mapping[str, torch.Size], ours: Mapping[str, torch.Size], *, tied: bool) -> Match:
    """Returns how the tensors of a checkpoint fit those of a model.

    Args:
        original, ours: shapes by name; ours without the head if it is tied.
    """
    return compare(
        original,
        ours,
        is_unused=lambda key: (tied and key == HEAD) or matches_any(key, OLD_BUFFERS),
        to_ours=to_ours,
        to_released=to_original,
    )


def to_ours(key: str) -> str:
    """Returns our name of an original tensor; of one that the layout does not know, a name that no model has."""
    for theirs, ours in PARTS:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return f"unknown.{key}"


def to_original(name: str) -> str:
    """Returns the original name of one of our tensors.

    Raises:
        ValueError: if the layout has no place for it.
    """
    for theirs, ours in PARTS:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"InternVL's layout has no place for {name}")
