"""Published InternVL2 checkpoints, generated: every key and shape of the original layout, at any size, any values."""

from __future__ import annotations

import json
from functools import partial

from eagle_train.data.tokenizer.added import write_tokenizer
from eagle_train.model.checkpoints.files import write_weights
from eagle_train.train.released_internvl import import_config, import_released
from tests.eagle1_layout import Shapes, linear, norm, random_weights
from tests.eagle2_layout import qwen_shapes, text_config

SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
TOKENS = (*SPECIAL, "<|im_start|>", "<|im_end|>")
VIT_300M = {"depth": 24, "width": 1024, "mlp": 4096, "heads": 16, "side": 32, "patch": 14}
TINY_VIT = {"depth": 2, "width": 16, "mlp": 24, "heads": 2, "side": 4, "patch": 8}
TINY_LLM = {
    "vocab_size": 523,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PHI3_ORIGINAL = 200
"""Tokens up to which the tiny Phi-3's rotary embedding has its short factors: some samples of the tests are longer."""
QWEN2_0_5B = {
    "vocab_size": 151655,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def vit_shapes(depth, width, mlp, heads, side, patch, *, qkv_bias=True, qk_norm=False) -> Shapes:
    """Returns InternViT's tensors."""
    shapes = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding": (1, 1 + side * side, width),
    }
    for n in range(depth):
        layer = f"encoder.layers.{n}"
        qkv = linear(f"{layer}.attn.qkv", width, 3 * width)
        shapes |= qkv if qkv_bias else {key: shape for key, shape in qkv.items() if not key.endswith("bias")}
        if qk_norm:
            shapes |= {f"{layer}.attn.{letter}_norm.weight": (width,) for letter in "qk"}
        shapes |= linear(f"{layer}.attn.proj", width, width)
        shapes |= norm(f"{layer}.norm1", width) | norm(f"{layer}.norm2", width)
        shapes |= {f"{layer}.ls1": (width,), f"{layer}.ls2": (width,)}
        shapes |= linear(f"{layer}.mlp.fc1", width, mlp) | linear(f"{layer}.mlp.fc2", mlp, width)
    return shapes


def internlm2_shapes(llm) -> Shapes:
    """Returns InternLM2's tensors."""
    width, head = llm["hidden_size"], llm["hidden_size"] // llm["num_attention_heads"]
    fused = (llm["num_attention_heads"] + 2 * llm["num_key_value_heads"]) * head
    shapes = {"model.tok_embeddings.weight": (llm["vocab_size"], width), "model.norm.weight": (width,)}
    shapes["output.weight"] = (llm["vocab_size"], width)
    for n in range(llm["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.attention.wqkv.weight": (fused, width),
            f"{layer}.attention.wo.weight": (width, width),
            f"{layer}.feed_forward.w1.weight": (llm["intermediate_size"], width),
            f"{layer}.feed_forward.w2.weight": (width, llm["intermediate_size"]),
            f"{layer}.feed_forward.w3.weight": (llm["intermediate_size"], width),
            f"{layer}.attention_norm.weight": (width,),
            f"{layer}.ffn_norm.weight": (width,),
        }
    return shapes


def phi3_shapes(llm) -> Shapes:
    """Returns Phi-3's tensors: Llama's, with one for queries, keys and values, and one for gate and up."""
    width, mlp = llm["hidden_size"], llm["intermediate_size"]
    head = width // llm["num_attention_heads"]
    fused = (llm["num_attention_heads"] + 2 * llm["num_key_value_heads"]) * head
    shapes = {"model.embed_tokens.weight": (llm["vocab_size"], width), "model.norm.weight": (width,)}
    shapes["lm_head.weight"] = (llm["vocab_size"], width)
    for n in range(llm["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.self_attn.qkv_proj.weight": (fused, width),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.mlp.gate_up_proj.weight": (2 * mlp, width),
            f"{layer}.mlp.down_proj.weight": (width, mlp),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    return shapes


def original_shapes(llm: dict, vit: dict = TINY_VIT, *, family="qwen2", tied=False, **of_vit) -> Shapes:
    """Returns the shape of every tensor of the original layout; `family` is that of the LLM."""
    makers = {"internlm2": internlm2_shapes, "phi3": phi3_shapes, "qwen2": partial(qwen_shapes, tied=tied)}
    language = makers[family](llm)
    width, hidden = 4 * vit["width"], llm["hidden_size"]
    return {
        **{f"vision_model.{name}": shape for name, shape in vit_shapes(**vit, **of_vit).items()},
        **{f"language_model.{name}": shape for name, shape in language.items()},
        **norm("mlp1.0", width),
        **linear("mlp1.1", width, hidden),
        **linear("mlp1.3", hidden, hidden),
    }


def internlm2_config(llm: dict) -> dict:
    """Returns InternLM2's config as released."""
    return llm | {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def phi3_config(llm: dict) -> dict:
    """Returns Phi-3's config as its first release had it, with short contexts."""
    pairs = llm["hidden_size"] // llm["num_attention_heads"] // 2
    return llm | {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "max_position_embeddings": 32 * PHI3_ORIGINAL,
        "original_max_position_embeddings": PHI3_ORIGINAL,
        "pad_token_id": 32000,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.1 + 3.0 * pair for pair in range(pairs)],
            "short_factor": [1.0 + 0.25 * pair for pair in range(pairs)],
            "type": "su",
        },
        "rope_theta": 10000.0,
        "sliding_window": 64 * PHI3_ORIGINAL,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def original_config(llm: dict, vit: dict = TINY_VIT, *, family="qwen2", tied=False, **of_vit) -> dict:
    """Returns a `config.json` of the original layout, with fields that nobody knows."""
    template, language = {
        "internlm2": ("internlm2-chat", internlm2_config(llm)),
        "phi3": ("phi3-chat", phi3_config(llm)),
        "qwen2": ("Hermes-2", text_config(llm, tied=tied, vocab_size=llm["vocab_size"])),
    }[family]
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": vit["side"] * vit["patch"],
        "llm_config": language | {"unheard_of": 1},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "torch_dtype": "bfloat16",
        "unheard_of": [1, 2],
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "drop_path_rate": 0.0,
            "hidden_act": "gelu",
            "hidden_size": vit["width"],
            "image_size": vit["side"] * vit["patch"],
            "initializer_factor": 1.0,
            "intermediate_size": vit["mlp"],
            "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm",
            "num_attention_heads": vit["heads"],
            "num_hidden_layers": vit["depth"],
            "patch_size": vit["patch"],
            "qk_normalization": of_vit.get("qk_norm", False),
            "qkv_bias": of_vit.get("qkv_bias", True),
            "torch_dtype": "bfloat16",
        },
    }


def write_original(folder, config, weights, data):
    """Writes a checkpoint of the original layout in three shards, with a tokenizer that has its special tokens."""
    write_weights(folder, weights, shard_bytes=sum(t.nbytes for t in weights.values()) // 3 + 1)
    write_tokenizer(str(data / "tokenizer"), TOKENS, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CASES = {
    "1b": {},
    "tied": {"tied": True},
    "qk-norm-without-bias": {"qk_norm": True, "qkv_bias": False},
    "internlm2": {"family": "internlm2"},
    "phi3": {"family": "phi3"},
}
"""Tiny checkpoints: arguments of `written`."""


def written(data, folder, **changes):
    """Writes a tiny checkpoint of the original layout, with norms and layer scales that let pictures through."""
    weights = random_weights(original_shapes(TINY_LLM, **changes))
    weights = {
        name: 1 + tensor * 0.1 if "norm" in name or name.endswith((".ls1", ".ls2", "mlp1.0.weight")) else tensor
        for name, tensor in weights.items()
    }
    return write_original(folder, original_config(TINY_LLM, **changes), weights, data)


def imported(folder, out):
    """Imports a checkpoint as its own files describe it; returns what became of it."""
    return import_released(folder, out, import_config(folder))
