"""InternLM2 and 2.5, which transformers does not have, as the Llama that they are: other names, fused projections.

    InternLM2                                    Llama
    model.tok_embeddings.weight                  model.embed_tokens.weight
    model.layers.{}.attention.wqkv.*             model.layers.{}.self_attn.{q,k,v}_proj.*, see `split_heads`
    model.layers.{}.attention.wo.*               model.layers.{}.self_attn.o_proj.*
    model.layers.{}.feed_forward.{w1,w3,w2}.*    model.layers.{}.mlp.{gate,up,down}_proj.*
    model.layers.{}.{attention,ffn}_norm.weight  model.layers.{}.{input,post_attention}_layernorm.weight
    output.weight                                lm_head.weight

Source: OpenGVLab/InternVL, `internvl/model/internlm2/modeling_internlm2.py` (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from eagle_train.model.checkpoints.names import Renames, rename, reversed_renames

LANDMARK = "model.tok_embeddings.weight"
NAMES: Renames = (
    (LANDMARK, "model.embed_tokens.weight"),
    ("output.weight", "lm_head.weight"),
    ("model.layers.{}.attention.wo.{}", "model.layers.{}.self_attn.o_proj.{}"),
    ("model.layers.{}.feed_forward.w1.{}", "model.layers.{}.mlp.gate_proj.{}"),
    ("model.layers.{}.feed_forward.w3.{}", "model.layers.{}.mlp.up_proj.{}"),
    ("model.layers.{}.feed_forward.w2.{}", "model.layers.{}.mlp.down_proj.{}"),
    ("model.layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight"),
    ("model.layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
)
FUSED = ".attention.wqkv."
PROJECTIONS = tuple(f".self_attn.{letter}_proj." for letter in "qkv")


def to_llama(weights: Mapping[str, torch.Tensor], num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Returns InternLM2's weights under Llama's names.

    Args:
        num_heads, num_kv_heads: of attention.
    """
    found = {}
    for name, tensor in weights.items():
        if FUSED in name:
            parts = split_heads(tensor, num_heads, num_kv_heads)
            found |= {name.replace(FUSED, own): part for own, part in zip(PROJECTIONS, parts, strict=True)}
        else:
            found[rename(name, NAMES)] = tensor
    return found


def from_llama(weights: Mapping[str, torch.Tensor], num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Returns what `to_llama` makes its result of."""
    queries, keys, values = PROJECTIONS
    found = {}
    for name, tensor in weights.items():
        if queries in name:
            others = (weights[name.replace(queries, own)] for own in (keys, values))
            found[name.replace(queries, FUSED)] = join_heads(tensor, *others, num_heads, num_kv_heads)
        elif keys not in name and values not in name:
            found[rename(name, reversed_renames(NAMES))] = tensor
    return found


def split_heads(
    fused: torch.Tensor, num_heads: int, num_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the projections of queries, keys and values of a fused one, ((H + 2 K) D, ...).

    For each of the K heads of keys: the rows of the H / K heads of queries that attend to it, its keys, its values.
    """
    groups = num_heads // num_kv_heads
    rows = fused.unflatten(0, (num_kv_heads, groups + 2, -1))
    return rows[:, :groups].flatten(0, 2), rows[:, -2].flatten(0, 1), rows[:, -1].flatten(0, 1)


def join_heads(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, num_heads: int, num_kv_heads: int
) -> torch.Tensor:
    """Returns the fused projection that `split_heads` takes apart."""
    by_head = queries.unflatten(0, (num_kv_heads, num_heads // num_kv_heads, -1))
    others = (part.unflatten(0, (num_kv_heads, 1, -1)) for part in (keys, values))
    return torch.cat([by_head, *others], dim=1).flatten(0, 2)
