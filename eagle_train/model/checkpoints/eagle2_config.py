"""The `config.json` of the released Eagle 2 and 2.5 checkpoints, of both generations, read: towers, LLM and folding.

    eagle_2_5_vl  vision_config, text_config; numbers of tiles are `*_dynamic_tiles`
    eagle_chat    vision_config, llm_config; numbers of tiles are `*_dynamic_patch`; the only one for several towers

Source: NVlabs/Eagle, `configuration_eagle2_5_vl.py` and `configuration_..._channel_concatentation_model.py`; NVIDIA's
Isaac-GR00T, `eagle2_hg_model/config.json`; vLLM, `eagle2_5_vl.py` (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

from eagle_train.model.checkpoints.eagle2 import CONVNEXT, EMBEDDINGS, SIGLIP, TOWERS, Tower

NEW, OLD = "eagle_2_5_vl", "eagle_chat"
MODEL_TYPES = (NEW, OLD)
SEVERAL = "MOB"
"""What the release calls several towers: `vision_path` is "MOB:convnext-1024;palisiglip"."""
MIXED = "convnext_512_siglip_448"
LLMS = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
}
"""Model type of transformers by architecture: those that the original code accepts."""
RENAMED = {"su": "longrope"}
"""Types of rotary embeddings by their first names."""
LLM_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLM_FIELDS = (
    "vocab_size",
    *LLM_SIZES,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)
"""Fields of an LLM that its weights and its use depend on, where its family has them; the rotary ones are apart."""
SIGLIP_FIELDS = (
    "image_size",
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def llm_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the LLM's part of a `config.json`; the older name counts if both are there, as in the original code.

    Raises:
        ValueError: if there is none.
    """
    for name in ("llm_config", "text_config"):
        if config.get(name):
            return config[name]
    raise ValueError("config.json has neither text_config nor llm_config")


def read_towers(config: Mapping[str, Any]) -> list[Tower]:
    """Returns the towers in the order of the release.

    Raises:
        ValueError: for a vision model that is not known.
    """
    vision = config.get("vision_config") or {}
    kind = vision.get("model_type")
    if kind == "siglip_vision_model":
        return [SIGLIP]
    known = {tower.released: tower for tower in TOWERS}
    names = str(vision.get("vision_path")).removeprefix(f"{SEVERAL}:").split(";")
    if kind != SEVERAL or sorted(names) != sorted(known) or vision.get("moe_version_type", MIXED) != MIXED:
        told = {name: vision.get(name) for name in ("model_type", "vision_path", "moe_version_type")}
        raise ValueError(
            f"vision_config {told} is not supported; it is siglip_vision_model, or {SEVERAL} with {MIXED} of "
            f"{' and '.join(known)}"
        )
    return [known[name] for name in names]


def read_encoders(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the sizes that a `config.json` gives, as constructor arguments, by the name of our encoder.

    Raises:
        ValueError: for features that are not those after the last layer and its norm, or tiles of another size than
            the learnt positions are for.
    """
    if config.get("select_layer", -1) != -1:
        raise ValueError(f"select_layer {config['select_layer']} is not supported; only -1, the last hidden state, is")
    vision = config["vision_config"]
    if vision["model_type"] == SEVERAL:
        siglip = vision.get("siglip_vision_config") or {}
        found = {CONVNEXT.name: {"image_size": vision.get("convnext_img_size", 512)}}
    else:
        siglip, found = vision, {}
    forced = config.get("force_image_size")
    if forced is not None and siglip.get("image_size", forced) != forced:
        raise ValueError(f"force_image_size is {forced}, but SigLIP's positions are for {siglip['image_size']} px")
    return {SIGLIP.name: {name: siglip[name] for name in SIGLIP_FIELDS if name in siglip}} | found


def read_fold(config: Mapping[str, Any]) -> int:
    """Returns the side, in tokens, of the squares of SigLIP's features that become one token.

    Raises:
        ValueError: for a ratio that is no whole square, or the older order of channels.
    """
    if not config.get("use_pixel_shuffle", True):
        return 1
    if config.get("ps_version", "v2") != "v2":
        raise ValueError(f"ps_version {config['ps_version']!r} is not supported; v2 is")
    ratio = config.get("downsample_ratio", 0.5)
    fold = round(1 / ratio)
    if fold * ratio != 1:
        raise ValueError(f"downsample_ratio {ratio} is not 1 over a whole number")
    return fold


def read_tiles(config: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Returns the fewest and most tiles of an image, and whether there is a thumbnail; one tile where it is not cut."""
    if not config.get("dynamic_image_size", False):
        return 1, 1, False
    least, most = (
        config.get(f"{end}_dynamic_tiles", config.get(f"{end}_dynamic_patch", default))
        for end, default in (("min", 1), ("max", 6))
    )
    return least, most, config.get("use_thumbnail", False)


def read_llm(config: Mapping[str, Any], vocab_size: int, *, tied: bool) -> dict[str, Any]:
    """Returns the LLM's fields, for `build_llm`.

    Args:
        vocab_size: rows of the table of embeddings. The released code shrinks it without telling its config.
        tied: whether the LM head is that table.

    Raises:
        ValueError: for an LLM that is not known, or whose sizes are missing.
    """
    given = llm_config(config)
    architecture = (given.get("architectures") or [None])[0]
    if architecture not in LLMS:
        raise ValueError(f"the LLM's architecture {architecture!r} is not supported; {', '.join(LLMS)} are")
    if missing := [name for name in LLM_SIZES if name not in given]:
        raise ValueError(f"config.json lacks {missing} of the LLM")
    kind = LLMS[architecture]
    known = AutoConfig.for_model(kind).to_dict()
    fields = {name: given[name] for name in LLM_FIELDS if given.get(name) is not None and name in known}
    fields |= {"vocab_size": vocab_size, "tie_word_embeddings": tied, "rope_parameters": read_rope(given)}
    if known.get("pad_token_id") is not None:  # torch would not train its row, which may also be beyond the table
        fields["pad_token_id"] = None
    return {"model_type": kind} | fields


def read_rope(llm: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary embedding of an LLM as transformers 5 has it, from its form or that of transformers 4."""
    if llm.get("rope_parameters"):
        return dict(llm["rope_parameters"])
    scaling = dict(llm.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", "default")
    scaling.pop("type", None)
    if "partial_rotary_factor" in llm:
        scaling["partial_rotary_factor"] = llm["partial_rotary_factor"]
    return {"rope_type": RENAMED.get(kind, kind), "rope_theta": llm.get("rope_theta", 10000.0)} | scaling


def read_vocab_size(shapes: Mapping[str, torch.Size]) -> int:
    """Returns the rows of a checkpoint's table of embeddings.

    Raises:
        ValueError: if it has none.
    """
    if EMBEDDINGS not in shapes:
        raise ValueError(f"the checkpoint has no {EMBEDDINGS}")
    return shapes[EMBEDDINGS][0]


def read_projector(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Returns the projector's arguments: its norm is a vector, its layers are matrices."""
    weights = [shape for key, shape in shapes.items() if key.startswith("mlp1.") and key.endswith(".weight")]
    return {"depth": sum(len(shape) == 2 for shape in weights), "layer_norm": any(len(shape) == 1 for shape in weights)}
