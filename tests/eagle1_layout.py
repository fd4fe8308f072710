"""Released Eagle 1 checkpoints, generated: every key and shape as published, at any depth and width, any values."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

X5 = "clip-448;convnext-1024;sam-1024;pix2struct-1024;det-1024"
X4 = "clip-448;convnext-1024;pix2struct-1024;det-1024"
X5_OF_THE_SCRIPTS = "clip-448;convnext-1024;sam-1024;det-1024;pix2struct-1024"
CHANNELS = {"clip-448": 1024, "convnext-1024": 3072, "sam-1024": 1024, "pix2struct-1024": 1536, "det-1024": 1024}

FULL = {
    "clip-448": {"depth": 24, "width": 1024, "mlp": 4096},
    "convnext-1024": {"depths": (3, 4, 30, 3), "dims": (384, 768, 1536, 3072)},
    "sam-1024": {"depth": 24, "width": 1024, "mlp": 4096, "heads": 16, "neck": 256, "global_layers": (5, 11, 17, 23)},
    "pix2struct-1024": {"depth": 18, "width": 1536, "mlp": 3968, "inner": 1536},
    "det-1024": {"depth": 24, "width": 1024, "mlp": 2730},
}
SHALLOW = {  # full width
    "clip-448": FULL["clip-448"] | {"depth": 1},
    "convnext-1024": FULL["convnext-1024"] | {"depths": (1, 1, 1, 1)},
    "sam-1024": FULL["sam-1024"] | {"depth": 2, "global_layers": (1,)},
    "pix2struct-1024": FULL["pix2struct-1024"] | {"depth": 1},
    "det-1024": FULL["det-1024"] | {"depth": 3},
}
TINY = {
    "clip-448": {"depth": 2, "width": 16, "mlp": 32},
    "convnext-1024": {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)},
    "sam-1024": {"depth": 2, "width": 16, "mlp": 32, "heads": 2, "neck": 4, "global_layers": (1,)},
    "pix2struct-1024": {"depth": 1, "width": 16, "mlp": 24, "inner": 16},
    "det-1024": {"depth": 3, "width": 64, "mlp": 170},
}
TINY_ENCODERS = {  # the same as overrides of our encoders' configs
    "clip": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "convnext": {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]},
    "sam": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "neck_channels": 4,
        "global_layers": [1],
    },
    "pix2struct": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    },
    "det": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1, "global_layers": [2]},
}
SHALLOW_ENCODERS = {
    "clip": {"num_hidden_layers": 1},
    "convnext": {"depths": [1, 1, 1, 1]},
    "sam": {"num_hidden_layers": 2, "global_layers": [1]},
    "pix2struct": {"num_hidden_layers": 1},
    "det": {"num_hidden_layers": 3, "global_layers": [2]},
}
VICUNA_13B = {
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA3_8B = {
    "vocab_size": 128257,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY_LLM = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

Shapes = dict[str, tuple[int, ...]]


def released_config(towers: str, llm: dict, channels: int | None = None) -> dict:
    """Returns a `config.json` as released, with fields that nobody knows."""
    names = towers.split(";")
    return llm | {
        "architectures": ["EagleLlamaForCausalLM"],
        "model_type": "eagle_llama",
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2",
        "max_length": 4096,
        "mm_projector_query_number": 128,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": channels or sum(CHANNELS[name] for name in names),
        "mm_vision_tower": towers,
        "tokenizer_model_max_length": 2048,
    }


def released_shapes(towers: str, llm: dict, sizes: dict, channels: int) -> Shapes:
    """Returns the shape of every tensor of a release; `channels` is the projector's input."""
    shapes = llm_shapes(**llm) | {
        "model.mm_projector.0.weight": (llm["hidden_size"], channels),
        "model.mm_projector.0.bias": (llm["hidden_size"],),
        "model.mm_projector.2.weight": (llm["hidden_size"], llm["hidden_size"]),
        "model.mm_projector.2.bias": (llm["hidden_size"],),
    }
    for index, name in enumerate(towers.split(";")):
        prefix = f"model.vision_tower.vision_towers.{index}.vision_tower."
        shapes |= {prefix + key: shape for key, shape in TOWER_SHAPES[name](**sizes[name]).items()}
    return shapes


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def llm_shapes(
    vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads
) -> Shapes:
    shared = hidden_size // num_attention_heads * num_key_value_heads
    shapes = {"model.embed_tokens.weight": (vocab_size, hidden_size)}
    for layer in range(num_hidden_layers):
        shapes |= {
            f"model.layers.{layer}.{key}": shape
            for key, shape in {
                "self_attn.q_proj.weight": (hidden_size, hidden_size),
                "self_attn.k_proj.weight": (shared, hidden_size),
                "self_attn.v_proj.weight": (shared, hidden_size),
                "self_attn.o_proj.weight": (hidden_size, hidden_size),
                "mlp.gate_proj.weight": (intermediate_size, hidden_size),
                "mlp.up_proj.weight": (intermediate_size, hidden_size),
                "mlp.down_proj.weight": (hidden_size, intermediate_size),
                "input_layernorm.weight": (hidden_size,),
                "post_attention_layernorm.weight": (hidden_size,),
            }.items()
        }
    return shapes | {"model.norm.weight": (hidden_size,), "lm_head.weight": (vocab_size, hidden_size)}


def clip_shapes(depth, width, mlp) -> Shapes:
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, width),
        **norm("pre_layrnorm", width),
        **norm("post_layernorm", width),
    }
    for n in range(depth):
        layer = f"encoder.layers.{n}"
        for projection in ("q", "k", "v", "out"):
            shapes |= linear(f"{layer}.self_attn.{projection}_proj", width, width)
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        shapes |= linear(f"{layer}.mlp.fc1", width, mlp) | linear(f"{layer}.mlp.fc2", mlp, width)
    return {f"vision_model.{key}": shape for key, shape in shapes.items()}


def convnext_shapes(depths, dims) -> Shapes:
    shapes = {"stem.0.weight": (dims[0], 3, 4, 4), "stem.0.bias": (dims[0],), **norm("stem.1", dims[0])}
    for s, (depth, width) in enumerate(zip(depths, dims, strict=True)):
        if s > 0:
            shapes |= norm(f"stages.{s}.downsample.0", dims[s - 1])
            shapes |= {
                f"stages.{s}.downsample.1.weight": (width, dims[s - 1], 2, 2),
                f"stages.{s}.downsample.1.bias": (width,),
            }
        for b in range(depth):
            block = f"stages.{s}.blocks.{b}"
            shapes |= {
                f"{block}.weight": (width,),
                f"{block}.conv_dw.weight": (width, 1, 7, 7),
                f"{block}.conv_dw.bias": (width,),
                **norm(f"{block}.norm", width),
                **linear(f"{block}.mlp.fc1", width, 4 * width),
                **linear(f"{block}.mlp.fc2", 4 * width, width),
            }
    return shapes | norm("head.norm", dims[-1]) | linear("head.fc", dims[-1], 1000)


def sam_shapes(depth, width, mlp, heads, neck, global_layers) -> Shapes:
    shapes = {
        "pos_embed": (1, 64, 64, width),
        "patch_embed.projection.weight": (width, 3, 16, 16),
        "patch_embed.projection.bias": (width,),
    }
    for n in range(depth):
        layer, distances = f"layers.{n}", 127 if n in global_layers else 27
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        shapes |= {f"{layer}.attn.rel_pos_{axis}": (distances, width // heads) for axis in "hw"}
        shapes |= linear(f"{layer}.attn.qkv", width, 3 * width) | linear(f"{layer}.attn.proj", width, width)
        shapes |= linear(f"{layer}.mlp.lin1", width, mlp) | linear(f"{layer}.mlp.lin2", mlp, width)
    return shapes | {"neck.conv1.weight": (neck, width, 1, 1)} | norm("neck.layer_norm1", neck)


def det_shapes(depth, width, mlp) -> Shapes:
    shapes = {
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    tables = {"rope_win": 256, "rope_glb": 4096}
    for n in range(depth):
        block = f"blocks.{n}"
        tables[f"{block}.attn.rope"] = 4096 if n % 3 == 2 else 256
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        shapes |= {f"{block}.attn.q_bias": (width,), f"{block}.attn.v_bias": (width,)}
        shapes |= {f"{block}.attn.{name}_proj.weight": (width, width) for name in "qkv"}
        shapes |= linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.w1", width, mlp) | linear(f"{block}.mlp.w2", width, mlp)
        shapes |= linear(f"{block}.mlp.w3", mlp, width) | norm(f"{block}.mlp.ffn_ln", mlp)
    return shapes | {f"{name}.freqs_{f}": (rows, 64) for name, rows in tables.items() for f in ("cos", "sin")}


def pix2struct_shapes(depth, width, mlp, inner) -> Shapes:
    shapes = {
        **linear("embeddings.patch_projection", 768, width),
        "embeddings.row_embedder.weight": (4096, width),
        "embeddings.column_embedder.weight": (4096, width),
    }
    for n in range(depth):
        layer = f"encoder.layer.{n}"
        shapes |= {f"{layer}.attention.{name}.weight": (inner, width) for name in ("query", "key", "value")}
        shapes |= {f"{layer}.attention.output.weight": (width, inner), f"{layer}.mlp.wo.weight": (width, mlp)}
        shapes |= {f"{layer}.mlp.wi_{i}.weight": (mlp, width) for i in (0, 1)}
        shapes |= {f"{layer}.pre_{name}_layer_norm.weight": (width,) for name in ("attention", "mlp")}
    return shapes | {"layernorm.weight": (width,)}


TOWER_SHAPES = {
    "clip-448": clip_shapes,
    "convnext-1024": convnext_shapes,
    "sam-1024": sam_shapes,
    "det-1024": det_shapes,
    "pix2struct-1024": pix2struct_shapes,
}


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns bfloat16 tensors of the given shapes, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).to(torch.bfloat16) * 0.05 for key, shape in shapes.items()}


def write_headers(folder: Path, config: dict, shapes: Shapes, num_shards: int) -> None:
    """Writes a release of bfloat16 zeros as sparse files: whole headers, no data on disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    keys = list(shapes)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        header, end = {}, 0
        for key in keys[shard::num_shards]:
            begin, end = end, end + 2 * torch.Size(shapes[key]).numel()
            header[key] = {"dtype": "BF16", "shape": list(shapes[key]), "data_offsets": [begin, end]}
            weight_map[key] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
