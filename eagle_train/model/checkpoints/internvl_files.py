"""The JSON files that serve an InternVL2 checkpoint, written, for the original code and for transformers' own classes.

Source: OpenGVLab/InternVL2-1B, `config.json`; transformers, `models/internvl/`, `models/got_ocr2/` (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import InternVLConfig, InternVLVisionConfig

from eagle_train.model.checkpoints import eagle2_config, eagle2_files
from eagle_train.model.checkpoints.internvl_config import INTERNLM2, ORIGINAL
from eagle_train.model.encoders.intern_vit import InternVit

HOME = "OpenGVLab/InternVL2-1B--"
"""Where transformers finds the original code: "repository--module.Class"."""
NEUTRAL: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": f"{HOME}configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": f"{HOME}modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": f"{HOME}modeling_internvl_chat.InternVLChatModel",
    },
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
}
"""Fields of the original that no weights depend on, as the releases have them."""
IMAGE_TOKEN, IMAGE_START, IMAGE_END, VIDEO_TOKEN = "<IMG_CONTEXT>", "<img>", "</img>", "<video>"
PROCESSOR = "InternVLProcessor"
BICUBIC = 3
"""Of Pillow's filters, as preprocessor configs name them."""


def original_config(
    *,
    llm: Mapping[str, Any],
    encoder: InternVit,
    fold: int,
    tiles: tuple[int, int, bool],
    template: str,
    dtype: str,
    original: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the `config.json` of the original layout.

    Args:
        llm: its transformers config as a dict.
        encoder: on any device.
        fold: side, in tokens, of the squares that become one token.
        tiles: fewest and most of an image, and whether there is a thumbnail.
        template: its name in the original code.
        dtype: of the weights, as `bfloat16`.
        original: the original `config.json` that the model was imported with, if it was; it keeps what is not known
            here, and an InternLM2.
    """
    least, most, thumbnail = tiles
    theirs = original.get("llm_config", {})
    written = as_original(eagle2_files.write_llm(llm, dtype), theirs)
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "initializer_factor": 1.0,
        "norm_type": "layer_norm",
        "num_channels": 3,
        "use_flash_attn": True,
        **original.get("vision_config", {}),
        **sizes_of(encoder),
        "qkv_bias": encoder.layers[0].attn.qkv.bias is not None,
        "qk_normalization": has_qk_norm(encoder),
        "torch_dtype": dtype,
    }
    ours = {
        "model_type": ORIGINAL,
        "vision_config": vision,
        "llm_config": theirs | written,
        "downsample_ratio": 1 / fold,
        "dynamic_image_size": most > 1,
        "force_image_size": encoder.input_size,
        "min_dynamic_patch": least,
        "max_dynamic_patch": most,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "torch_dtype": dtype,
        "use_thumbnail": thumbnail,
    }
    return NEUTRAL | dict(original) | ours


def as_original(written: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of an LLM as the original code's own classes read them.

    Args:
        theirs: those that the model was imported with, if it was.
    """
    if (theirs.get("architectures") or [None])[0] == INTERNLM2:
        return as_internlm2(written, theirs)
    scaling = written["rope_scaling"]
    if scaling is None or scaling.get("type") != "longrope":
        return dict(written)
    # Its Phi-3 knows LongRoPE by its first name alone; that of later releases may know the other.
    return dict(written) | {"rope_scaling": scaling | {"type": (theirs.get("rope_scaling") or {}).get("type", "su")}}


def as_internlm2(llama: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of an LLM that is written as the InternLM2 that it was imported as."""
    scaling = llama["rope_scaling"] and {
        {"rope_type": "type"}.get(name, name): value for name, value in llama["rope_scaling"].items()
    }
    kept = ("architectures", "model_type")
    dropped = ("attention_bias", "mlp_bias", "head_dim")
    return {name: value for name, value in llama.items() if name not in (*kept, *dropped)} | {
        **{name: theirs[name] for name in kept if name in theirs},
        "bias": llama.get("attention_bias", False),
        "rope_scaling": scaling,
    }


def native_config(
    *,
    llm: Mapping[str, Any],
    encoder: InternVit,
    fold: int,
    tokens_per_tile: int,
    image_token_id: int,
    dtype: str,
) -> dict[str, Any]:
    """Returns the `config.json` of transformers' layout; the arguments are those of `original_config`."""
    vision = InternVLVisionConfig(
        **sizes_of(encoder),
        attention_bias=encoder.layers[0].attn.qkv.bias is not None,
        use_qk_norm=has_qk_norm(encoder),
        layer_scale_init_value=1.0,
    )
    private = ("name_or_path", "_name_or_path", "transformers_version")
    text = {name: value for name, value in llm.items() if name not in private}
    kinds = {kind: name for name, kind in eagle2_config.LLMS.items()}
    config = InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        vision_config=vision,
        text_config=text | {"architectures": [kinds[llm["model_type"]]], "dtype": dtype},
        image_token_id=image_token_id,
        image_seq_length=tokens_per_tile,
        downsample_ratio=1 / fold,
        tie_word_embeddings=llm["tie_word_embeddings"],  # by itself the class says yes
        dtype=dtype,
    )
    return config.to_dict()


def sizes_of(encoder: InternVit) -> dict[str, Any]:
    """Returns the fields of an InternViT that both layouts call the same."""
    layer = encoder.layers[0]
    return {
        "hidden_size": encoder.channels,
        "image_size": encoder.input_size,
        "intermediate_size": layer.mlp.fc1.out_features,
        "layer_norm_eps": layer.norm1.eps,
        "num_attention_heads": layer.attn.num_heads,
        "num_hidden_layers": len(encoder.layers),
        "patch_size": encoder.input_size // encoder.grid,
    }


def has_qk_norm(encoder: InternVit) -> bool:
    """Returns whether queries and keys are normalized."""
    return any(".q_norm." in name for name, _ in encoder.named_parameters())


def preprocessor_config(
    *, tile_size: int, mean: Sequence[float], std: Sequence[float], tiles: tuple[int, int, bool]
) -> dict[str, Any]:
    """Returns `preprocessor_config.json` of transformers' layout.

    Args:
        tile_size: pixels.
        mean, std: RGB statistics, in 0..1.
        tiles: fewest and most of an image; the processor always adds the thumbnail.
    """
    least, most, _ = tiles
    return pixels(tile_size, mean, std) | {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": most > 1,
        "min_patches": least,
        "max_patches": most,
    }


def video_preprocessor_config(*, tile_size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Returns `video_preprocessor_config.json` of transformers' layout: a tile per frame."""
    return pixels(tile_size, mean, std) | {"video_processor_type": "InternVLVideoProcessor", "do_sample_frames": False}


def pixels(tile_size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Returns what the processors of images and of videos share."""
    return {
        "processor_class": PROCESSOR,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": tile_size, "width": tile_size},
    }


def processor_config(tokens_per_tile: int) -> dict[str, Any]:
    """Returns `processor_config.json` of transformers' layout."""
    return {"processor_class": PROCESSOR, "image_seq_length": tokens_per_tile}


def with_media_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a `tokenizer_config.json` that names the tokens which transformers' processor asks its tokenizer for.

    `<video>` becomes a token by that. No sequence holds it: the processor puts the frames in its place.
    """
    named = {
        "start_image_token": IMAGE_START,
        "end_image_token": IMAGE_END,
        "context_image_token": IMAGE_TOKEN,
        "video_token": VIDEO_TOKEN,
    }
    given = tokenizer_config.get("extra_special_tokens", {})
    return dict(tokenizer_config) | {
        "extra_special_tokens": (given if isinstance(given, dict) else {}) | named,
        "processor_class": PROCESSOR,
    }
