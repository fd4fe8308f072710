"""The JSON files of the released Qwen2-VL checkpoints, read and written, and the chat template.

`config.json` is flat on the hub; transformers 5 writes the LLM's fields into a `text_config`. Both are read, and
written as they were; without a release behind a model, as on the hub.

Source: Qwen/Qwen2-VL-2B-Instruct and -7B-Instruct; transformers, `Qwen2VLConfig` and `Qwen2VLImageProcessor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Qwen2VLConfig

from eagle_train.model.checkpoints.statistics import read_statistics

MODEL_TYPE = "qwen2_vl"
LLM_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "bos_token_id",
    "eos_token_id",
)
"""Fields of the LLM that its weights and its use depend on; the rotary ones are apart."""
MAY_BE_NONE = ("bos_token_id", "eos_token_id")
"""Fields whose defaults are ids of the released tokenizer."""
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
CHAT_TEMPLATE = (
    "{%- set seen = namespace(image=0, video=0) -%}"
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ['image', 'image_url'] or 'image' in part or 'image_url' in part -%}"
    "{%- set seen.image = seen.image + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Picture ' ~ seen.image ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'video' or 'video' in part -%}"
    "{%- set seen.video = seen.video + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Video ' ~ seen.video ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""Of the layout; the processor puts an image's or video's tokens in place of a single one."""


def read_llm(original: Mapping[str, Any], vocab_size: int, *, tied: bool) -> dict[str, Any]:
    """Returns the LLM's fields, for `build_qwen2_vl_llm`.

    Args:
        original: the `config.json`.
        vocab_size: rows of the table of embeddings.
        tied: whether the LM head is that table.
    """
    text = parse(original).text_config.to_dict()
    fields = {name: text[name] for name in LLM_FIELDS if text.get(name) is not None or name in MAY_BE_NONE}
    rope = {name: value for name, value in text["rope_parameters"].items() if name != "type"}
    return fields | {"vocab_size": vocab_size, "tie_word_embeddings": tied, "rope_parameters": rope}


def is_tied(original: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` says that the LM head is the table of embeddings."""
    return bool(parse(original).tie_word_embeddings)


def read_encoder(original: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the vision transformer's arguments.

    Args:
        preprocessor: the `preprocessor_config.json`; statistics that it does not have are CLIP's.

    Raises:
        ValueError: for another activation than the released.
    """
    vision = parse(original).vision_config
    if vision.hidden_act != "quick_gelu" or vision.in_channels != 3:
        raise ValueError(f"hidden_act {vision.hidden_act} or in_channels {vision.in_channels} is not supported")
    return read_statistics(preprocessor) | {
        "patch_size": vision.patch_size,
        "frames": vision.temporal_patch_size,
        "merge": vision.spatial_merge_size,
        "hidden_size": vision.embed_dim,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.num_heads,
        "mlp_ratio": float(vision.mlp_ratio),
    }


def read_bounds(preprocessor: Mapping[str, Any]) -> dict[str, int]:
    """Returns the fewest and most pixels of an image, as far as `preprocessor_config.json` tells, in either form."""
    size = preprocessor.get("size") or {}
    told = {
        "min_pixels": preprocessor.get("min_pixels", size.get("shortest_edge")),
        "max_pixels": preprocessor.get("max_pixels", size.get("longest_edge")),
    }
    return {name: value for name, value in told.items() if value is not None}


def parse(original: Mapping[str, Any]) -> Qwen2VLConfig:
    """Returns a `config.json` as transformers has it, what it does not tell filled in."""
    return Qwen2VLConfig.from_dict(dict(original))


def write_config(
    *,
    llm: Mapping[str, Any],
    vision: Mapping[str, Any],
    ids: Mapping[str, int],
    tied: bool,
    dtype: str,
    original: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the `config.json` of a model.

    Args:
        llm: its transformers config as a dict.
        vision: the `vision_config`.
        ids: those of `TOKENS`.
        tied: whether the LM head is the table of embeddings.
        dtype: of the weights, as `bfloat16`.
        original: the `config.json` that the model was imported with, if it was; it keeps what is not known here.
    """
    rope = dict(llm["rope_parameters"])
    fields = {name: llm.get(name) for name in LLM_FIELDS if llm.get(name) is not None or name in MAY_BE_NONE}
    ours = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": MODEL_TYPE, "tie_word_embeddings": tied}
    ours |= dict(ids) | {"vision_config": dict(original.get("vision_config", {})) | dict(vision)}
    if "text_config" in original:
        nested = {"text_config": original["text_config"] | fields | {"rope_parameters": rope, "dtype": dtype}}
        return dict(original) | ours | nested | {"dtype": dtype}
    scaling = {"type": "mrope", "mrope_section": list(rope["mrope_section"])}
    flat = fields | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "torch_dtype": dtype}
    return dict(original) | ours | flat


def preprocessor_config(
    *, patch_size: int, frames: int, merge: int, mean: Sequence[float], std: Sequence[float], bounds: tuple[int, int]
) -> dict[str, Any]:
    """Returns `preprocessor_config.json`.

    Args:
        patch_size: pixels.
        frames, merge: patches of a tile in time and on a side.
        mean, std: RGB statistics, in 0..1.
        bounds: fewest and most pixels of an image.
    """
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": patch_size,
        "temporal_patch_size": frames,
        "merge_size": merge,
        "image_mean": list(mean),
        "image_std": list(std),
        "min_pixels": bounds[0],
        "max_pixels": bounds[1],
    }
