"""The `config.json` of published InternVL2 checkpoints, original and transformers' own, read.

    internvl_chat  vision_config, llm_config; tiles, template and order of the pixel shuffle
    internvl       vision_config, text_config; tiles are in `preprocessor_config.json`, the order is always "v2"

Source: OpenGVLab/InternVL, `configuration_internvl_chat.py`, `configuration_intern_vit.py` (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eagle_train.model.checkpoints import eagle2_config

ORIGINAL, NATIVE = "internvl_chat", "internvl"
MODEL_TYPES = (ORIGINAL, NATIVE)
INTERNLM2 = "InternLM2ForCausalLM"
VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "layer_norm_eps": "norm_eps",
}
"""Our arguments by the names of both layouts."""
# The original code's defaults are those of InternViT-6B: no bias, but norms.
BIAS_AND_NORM = {ORIGINAL: ("qkv_bias", "qk_normalization"), NATIVE: ("attention_bias", "use_qk_norm")}
TEMPLATES = {
    "Hermes-2": "hermes2",
    "internlm2-chat": "internlm2",
    "phi3-chat": "phi3_chat",
    "internvl2_5": "internvl2_5",
}
"""Our chat templates by the names in `template`."""
NATIVE_TEMPLATE = "internvl_hf"


def read_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns InternViT's constructor arguments.

    Raises:
        ValueError: for a vision model that is not an InternViT with layer norms whose last layer's features are used.
    """
    kind, vision = config["model_type"], config["vision_config"]
    told = {
        "norm_type": vision.get("norm_type", "layer_norm") == "layer_norm",
        "hidden_act": vision.get("hidden_act", "gelu") == "gelu",
        "use_mean_pooling": vision.get("use_mean_pooling", True) is True,
        "select_layer": config.get("select_layer", config.get("vision_feature_layer", -1)) == -1,
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default") == "default",
    }
    if wrong := [name for name, fine in told.items() if not fine]:
        given = {name: vision.get(name, config.get(name)) for name in wrong}
        raise ValueError(f"{given} is not supported: InternViT has layer norms, GELU, and the last layer's features")
    image_size, patch_size = (one_side(vision[name], name) for name in ("image_size", "patch_size"))
    if (forced := config.get("force_image_size") or image_size) != image_size:
        raise ValueError(f"force_image_size is {forced}, but InternViT's positions are for {image_size} px")
    bias, norm = BIAS_AND_NORM[kind]
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "qkv_bias": vision.get(bias, False),
        "qk_norm": vision.get(norm, kind == ORIGINAL),
        **{ours: vision[theirs] for theirs, ours in VISION_FIELDS.items() if theirs in vision},
    }


def one_side(value: int | list[int], name: str) -> int:
    """Returns a side in pixels, which transformers gives twice.

    Raises:
        ValueError: for two of unlike length.
    """
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"{name} {value} is no square")
    return sides.pop()


def read_fold(config: Mapping[str, Any]) -> int:
    """Returns the side, in tokens, of the squares of features that become one token.

    Raises:
        ValueError: for a ratio that is no whole square, or the order of InternVL 1.
    """
    shuffle = {"ps_version": config.get("ps_version", "v1")} if config["model_type"] == ORIGINAL else {}
    return eagle2_config.read_fold(shuffle | {"downsample_ratio": config.get("downsample_ratio", 0.5)})


def read_tiles(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Returns the fewest and most tiles of an image, and whether there is a thumbnail.

    Args:
        preprocessor: `preprocessor_config.json`; transformers' layout has them there. Its processor always cuts, and
            always adds the thumbnail.
    """
    if config["model_type"] == ORIGINAL:
        return eagle2_config.read_tiles(config)
    return preprocessor.get("min_patches", 1), preprocessor.get("max_patches", 12), True


def read_template(config: Mapping[str, Any]) -> str:
    """Returns the name of our chat template.

    Raises:
        ValueError: for one that is not known.
    """
    if config["model_type"] == NATIVE:
        return NATIVE_TEMPLATE
    if config.get("template") not in TEMPLATES:
        raise ValueError(
            f"template {config.get('template')!r} is not known; {', '.join(TEMPLATES)} are; give --experiment"
        )
    return TEMPLATES[config["template"]]


def llm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the LLM's part of a `config.json`, an InternLM2 as the Llama that it is.

    Raises:
        ValueError: if there is none.
    """
    given = dict(eagle2_config.llm_config(config))
    kinds = {kind: name for name, kind in eagle2_config.LLMS.items()}
    given["architectures"] = given.get("architectures") or [kinds.get(given.get("model_type"))]
    if is_internlm2(config):
        given |= {"architectures": ["LlamaForCausalLM"], "attention_bias": given.get("bias", False)}
    return given


def is_internlm2(config: Mapping[str, Any]) -> bool:
    """Returns whether the LLM is an InternLM2."""
    return (eagle2_config.llm_config(config).get("architectures") or [None])[0] == INTERNLM2


def is_tied(config: Mapping[str, Any]) -> bool:
    """Returns whether the config says that the LM head is the table of embeddings.

    Transformers' layout says so beside the LLM's part, and says yes where it says nothing.
    """
    if config["model_type"] == NATIVE:
        return bool(config.get("tie_word_embeddings", True))
    return bool(eagle2_config.llm_config(config).get("tie_word_embeddings", False))
