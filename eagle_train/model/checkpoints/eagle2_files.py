"""The JSON files that serve an Eagle 2 or 2.5 checkpoint, written, and SigLIP's pooling head.

Source: NVlabs/Eagle, `configuration_eagle2_5_vl.py`; NVIDIA's Isaac-GR00T, `eagle2_hg_model/`: `config.json`,
`preprocessor_config.json`, `processor_config.json`; vLLM, `eagle2_5_vl.py` (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from eagle_train.model.checkpoints.eagle2 import Tower
from eagle_train.model.checkpoints.eagle2_config import LLM_FIELDS, LLMS, MIXED, NEW, OLD, SEVERAL, SIGLIP_FIELDS

HOME = "nvidia/Eagle2.5-8B--"
"""Where transformers finds the code of a class in `auto_map`: "repository--module.Class"."""
NEUTRAL: dict[str, Any] = {
    "ps_version": "v2",
    "loss_version": "efficient_v2_cp_head",
    "mlp_checkpoint": False,
    "pad2square": False,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
}
"""Fields that the original code reads and that no weights depend on, as its releases have them."""
IMAGE_TOKEN, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
PLACEHOLDER = "<image>"
"""What vLLM's processor of this family replaces by an image's tokens, start and end."""
PROCESSOR = "Eagle2_5_VLProcessor"
IMAGE_PROCESSOR = "Eagle2_5_VLImageProcessorFast"
CLASSES = ("auto_map", "image_processor_type", "processor_class")
"""Fields that name code, which a release may have beside it."""
AUTO_MAP = {
    "AutoImageProcessor": f"{HOME}image_processing_eagle2_5_vl_fast.{IMAGE_PROCESSOR}",
    "AutoProcessor": f"{HOME}processing_eagle2_5_vl.{PROCESSOR}",
}
BICUBIC = 3
"""Of Pillow's filters, as preprocessor configs name them."""


def write_config(
    *,
    llm: Mapping[str, Any],
    towers: Sequence[Tower],
    siglip: Mapping[str, Any],
    convnext_size: int | None,
    projector_layers: int,
    fold: int,
    tiles: tuple[int, int, bool],
    image_token_id: int,
    pooling_head: bool,
    dtype: str,
    original: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the `config.json` of a model.

    Args:
        llm: its transformers config as a dict.
        towers: in the order of the release.
        siglip: the transformers config of SigLIP as a dict.
        convnext_size: pixels; None without ConvNeXt.
        projector_layers: linear ones.
        fold: see `read_fold`.
        tiles: fewest and most of an image, and whether there is a thumbnail.
        image_token_id: of the token in the places of visual ones.
        pooling_head: whether the weights of SigLIP's attention pooling are written.
        dtype: of the weights, as `bfloat16`.
        original: the `config.json` that the model was imported with, if it was; it keeps what is not known here.
    """
    kind = original.get("model_type", NEW if len(towers) == 1 else OLD)
    least, most, thumbnail = tiles
    vision, tower = original.get("vision_config", {}), write_siglip(siglip, pooling_head=pooling_head)
    if len(towers) > 1:
        tower = write_several(towers, vision.get("siglip_vision_config", {}) | tower, convnext_size)
    text = "llm_config" if kind == OLD or original.get("llm_config") else "text_config"
    ours = {
        "model_type": kind,
        "vision_config": vision | tower,
        text: original.get(text, {}) | write_llm(llm, dtype),
        "downsample_ratio": 1 / fold,
        "dynamic_image_size": most > 1,
        "force_image_size": siglip["image_size"],
        "select_layer": -1,
        # vLLM reads the older names of both generations.
        "min_dynamic_patch": least,
        "max_dynamic_patch": most,
        "use_thumbnail": thumbnail,
        "torch_dtype": dtype,
    }
    if kind == NEW:
        ours |= {
            "image_token_index": image_token_id,
            "min_dynamic_tiles": least,
            "max_dynamic_tiles": most,
            "mlp_connector_layers": projector_layers,
            "tie_word_embeddings": llm["tie_word_embeddings"],
            "use_pixel_shuffle": fold > 1,
        }
    return NEUTRAL | write_generation(kind) | dict(original) | ours


def write_generation(kind: str) -> dict[str, Any]:
    """Returns the names of the original classes, and where transformers finds their code, of one generation."""
    if kind == NEW:
        name, home, stem = "Eagle2_5_VLForConditionalGeneration", HOME, "eagle2_5_vl"
        classes = {"AutoConfig": f"configuration_{stem}.Eagle2_5_VLConfig", "AutoModel": f"modeling_{stem}.{name}"}
    else:
        name, home, stem = "Eagle2ChatModel", "nvidia/Eagle2-9B--", "eagle_chat"
        classes = {"AutoConfig": f"configuration_{stem}.Eagle2ChatConfig", "AutoModel": f"modeling_{stem}.{name}"}
    classes["AutoModelForCausalLM"] = classes["AutoModel"]
    return {
        "architectures": [name],
        "auto_map": {auto: home + where for auto, where in classes.items()},
        "template": "qwen2-chat",
    }


def write_siglip(siglip: Mapping[str, Any], *, pooling_head: bool) -> dict[str, Any]:
    """Returns the `vision_config` of SigLIP alone."""
    return {name: siglip[name] for name in SIGLIP_FIELDS} | {
        "model_type": "siglip_vision_model",
        "attention_dropout": siglip["attention_dropout"],
        "hidden_act": siglip["hidden_act"],
        "layer_norm_eps": siglip["layer_norm_eps"],
        "num_channels": siglip["num_channels"],
        "vision_use_head": pooling_head,
    }


def write_several(towers: Sequence[Tower], siglip: Mapping[str, Any], convnext_size: int | None) -> dict[str, Any]:
    """Returns the `vision_config` of several towers."""
    return {
        "model_type": SEVERAL,
        "vision_path": f"{SEVERAL}:{';'.join(tower.released for tower in towers)}",
        "moe_version_type": MIXED,
        "hidden_size": "lazy_calculation",
        "delay_load": True,
        "grid_size": siglip["image_size"] // siglip["patch_size"],
        "siglip_img_size": siglip["image_size"],
        "convnext_img_size": convnext_size,
        "image_size": siglip["image_size"],
        "mm_vision_select_layer": -1,
        "freeze_backbones": None,
        "normalize_type": "siglip",
        "siglip_vision_config": dict(siglip),
        "vision_tower_siglip_path": "",
        "vision_tower_convnext_path": "convnext_xxlarge.clip_laion2b_soup",
    }


def write_llm(llm: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the LLM's part, rotary embedding in the form of transformers 4, which 5 reads too."""
    architecture = {kind: name for name, kind in LLMS.items()}[llm["model_type"]]
    rope = dict(llm["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    fields = {name: llm[name] for name in LLM_FIELDS if name in llm}
    if kind == "longrope":  # these three fields and no other
        fields["rope_scaling"] = {"type": kind} | {name: rope[name] for name in ("short_factor", "long_factor")}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return {
        "architectures": [architecture],
        "model_type": llm["model_type"],
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"rope_type": kind} | rope,
        "torch_dtype": dtype,
        **fields,
    }


def preprocessor_config(
    *,
    tile_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    tiles: tuple[int, int, bool],
    tokens_per_tile: int,
) -> dict[str, Any]:
    """Returns `preprocessor_config.json`.

    Args:
        tile_size: pixels.
        mean, std: RGB statistics, in 0..1.
        tiles: fewest and most of an image, and whether there is a thumbnail.
    """
    least, most, thumbnail = tiles
    return {
        "auto_map": AUTO_MAP,
        "image_processor_type": IMAGE_PROCESSOR,
        "processor_class": PROCESSOR,
        "data_format": "channels_first",
        "default_to_square": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": False,
        "do_rescale": True,
        "do_resize": False,
        "image_mean": list(mean),
        "image_std": list(std),
        "max_dynamic_tiles": most,
        "min_dynamic_tiles": least,
        "pad_during_tiling": False,
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": tile_size, "width": tile_size},
        "tokens_per_tile": tokens_per_tile,
        "use_thumbnail": thumbnail,
    }


def processor_config(tokens_per_tile: int) -> dict[str, Any]:
    """Returns `processor_config.json`."""
    return {
        "auto_map": AUTO_MAP,
        "processor_class": PROCESSOR,
        "image_start_token": IMAGE_START,
        "image_end_token": IMAGE_END,
        "image_token": IMAGE_TOKEN,
        "video_token": IMAGE_TOKEN,
        "image_placeholder": "image",
        "video_placeholder": "video",
        "tokens_per_tile": tokens_per_tile,
    }


def merged(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a release's processor config with our values; it keeps its classes and the fields not known here."""
    return dict(theirs) | {name: value for name, value in ours.items() if name not in CLASSES or name not in theirs}


def pooling_head(siglip: SiglipVisionConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns an untrained attention pooling head by name, without `head.`: norms at their start, all else zero."""
    sizes = siglip.to_dict() | {"vision_use_head": True, "num_hidden_layers": 1}
    with torch.device("meta"):
        shapes = SiglipVisionModel(SiglipVisionConfig(**sizes)).state_dict()
    head = {name.removeprefix("head."): tensor.shape for name, tensor in shapes.items() if name.startswith("head.")}
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in head.items()}
    tensors["layernorm.weight"].fill_(1.0)
    return tensors


def generation_config(stop_ids: Sequence[int], ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Returns `generation_config.json`.

    Args:
        stop_ids: tokens that end an answer.
        ids: of the tokenizer's `bos_token_id` and `pad_token_id`, or None.
    """
    return {"eos_token_id": list(stop_ids)} | {name: token for name, token in ids.items() if token is not None}
