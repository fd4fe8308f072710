"""The `config.json` of the released Eagle 1 checkpoints: towers and LLM, read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from eagle_train.model.checkpoints.eagle1 import TOWERS, Tower
from eagle_train.model.checkpoints.eagle2_config import read_rope

LLM_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)
"""Fields of a `LlamaConfig` that its weights and its use depend on; the base of the rotary embedding is apart."""
NEUTRAL: dict[str, Any] = {
    "architectures": ["EagleLlamaForCausalLM"],
    "model_type": "eagle_llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "use_cache": True,
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
"""Fields that the original code reads and that no weights depend on, as its scripts leave them."""


def read_towers(config: Mapping[str, Any]) -> dict[str, Tower]:
    """Returns the towers by our encoder names, in the order of `mm_vision_tower`; other fields may be anything.

    Raises:
        ValueError: if a tower is unknown, or their channels do not sum to `mm_hidden_size`.
    """
    known = {tower.released: tower for tower in TOWERS}
    names = str(config.get("mm_vision_tower")).split(";")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"mm_vision_tower {';'.join(names)!r} has {unknown}; known are {', '.join(known)}")
    towers = {known[name].name: known[name] for name in names}
    channels = sum(tower.channels for tower in towers.values())
    if config.get("mm_hidden_size") != channels or len(towers) != len(names):
        raise ValueError(
            f"mm_hidden_size is {config.get('mm_hidden_size')}, but {';'.join(names)} have {channels} channels"
        )
    return towers


def read_projector_depth(config: Mapping[str, Any]) -> int:
    """Returns the number of linear layers of the projector.

    Raises:
        ValueError: for another kind of projector than `mlp{depth}x_gelu`.
    """
    kind = str(config.get("mm_projector_type"))
    if found := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        return int(found[1])
    raise ValueError(f"mm_projector_type {kind!r} is not supported; only mlp2x_gelu and the like are")


def read_llm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the LLM's fields, for `build_llm`.

    Raises:
        ValueError: if a size is missing, or the rotary embedding is scaled.
    """
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in sizes if name not in config]:
        raise ValueError(f"config.json lacks {missing}")
    rope = read_rope(config)
    if rope["rope_type"] != "default":
        scaling = {name: config[name] for name in ("rope_scaling", "rope_parameters") if config.get(name)}
        raise ValueError(f"the scaled rotary embedding {scaling} is not supported")
    fields = {name: config[name] for name in LLM_FIELDS if config.get(name) is not None}
    return {"model_type": "llama", "tie_word_embeddings": False} | fields | {"rope_parameters": rope}


def write_config(
    llm: Mapping[str, Any],
    towers: Mapping[str, Tower],
    depth: int,
    dtype: str,
    max_length: int,
    original: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the `config.json` of a model.

    Args:
        llm: its `LlamaConfig` as a dict.
        towers: by encoder name, in order.
        depth: of the projector.
        dtype: of the weights, as `bfloat16`.
        max_length: tokens of a sample, visual ones counted.
        original: the `config.json` that the model was imported with, if it was; it keeps what is not known here.
    """
    ends = llm["eos_token_id"]  # one or several
    pad = (ends[0] if isinstance(ends, list) else ends) if llm["pad_token_id"] is None else llm["pad_token_id"]
    config = NEUTRAL | {"pad_token_id": pad, "tokenizer_model_max_length": max_length} | dict(original)
    config |= {name: llm[name] for name in LLM_FIELDS}
    return config | {
        "rope_theta": llm["rope_parameters"]["rope_theta"],
        "torch_dtype": dtype,
        "mm_hidden_size": sum(tower.channels for tower in towers.values()),
        "mm_projector_type": f"mlp{depth}x_gelu",
        "mm_vision_tower": ";".join(tower.released for tower in towers.values()),
    }
