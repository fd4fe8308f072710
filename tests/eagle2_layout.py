"""Released Eagle 2 and 2.5 checkpoints, generated: every key and shape as published, at any size, any values."""

from __future__ import annotations

import json

from eagle_train.data.tokenizer.added import write_tokenizer
from eagle_train.model.checkpoints.files import write_weights
from eagle_train.train.released_eagle2 import HEAD, import_config, import_released
from tests.eagle1_layout import Shapes, convnext_shapes, linear, llm_shapes, norm

SO400M = {"depth": 27, "width": 1152, "mlp": 4304, "side": 32, "patch": 14}
TINY_SIGLIP = {"depth": 2, "width": 16, "mlp": 24, "side": 4, "patch": 8}
XXL = {"depths": (3, 4, 30, 3), "dims": (384, 768, 1536, 3072)}
TINY_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
QWEN_0_5B = {
    "vocab_size": 151676,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
QWEN_7B = {
    "vocab_size": 151676,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
TINY_LLM = {
    "vocab_size": 525,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ALONE = "vision_model.vision_model."
NUMBERED = "vision_model.vision_model.vision_towers.{}.vision_tower."
MOVE = ("convnext-1024", "palisiglip")


def siglip_shapes(depth, width, mlp, side, patch, pooling=True) -> Shapes:
    """Returns SigLIP's tensors without the prefix that transformers 4 gives them."""
    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (side * side, width),
        **norm("post_layernorm", width),
    }
    for n in range(depth):
        layer = f"encoder.layers.{n}"
        for projection in ("q", "k", "v", "out"):
            shapes |= linear(f"{layer}.self_attn.{projection}_proj", width, width)
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        shapes |= linear(f"{layer}.mlp.fc1", width, mlp) | linear(f"{layer}.mlp.fc2", mlp, width)
    if not pooling:
        return shapes
    return shapes | {
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        **linear("head.attention.out_proj", width, width),
        **norm("head.layernorm", width),
        **linear("head.mlp.fc1", width, mlp),
        **linear("head.mlp.fc2", mlp, width),
    }


def qwen_shapes(llm: dict, *, family: str = "qwen2", tied: bool) -> Shapes:
    """Returns a Qwen's tensors: Llama's, and biases (Qwen 2) or norms (Qwen 3) of queries and keys."""
    shapes = llm_shapes(**llm)
    head = llm["hidden_size"] // llm["num_attention_heads"]
    for layer in range(llm["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        if family == "qwen2":
            for name in "qkv":
                shapes[f"{attention}.{name}_proj.bias"] = shapes[f"{attention}.{name}_proj.weight"][:1]
        else:
            shapes |= {f"{attention}.{name}_norm.weight": (head,) for name in "qk"}
    if tied:
        del shapes["lm_head.weight"]
    return shapes


def released_shapes(
    llm: dict,
    siglip: dict = TINY_SIGLIP,
    convnext: dict | None = None,
    *,
    family: str = "qwen2",
    tied: bool = False,
    pooling: bool = True,
    layer_scale: str = "gamma",
) -> Shapes:
    """Returns the shape of every tensor of a release; with `convnext`, of one with several towers."""
    language = {f"language_model.{name}": s for name, s in qwen_shapes(llm, family=family, tied=tied).items()}
    tower, width = siglip_shapes(**siglip, pooling=pooling), 4 * siglip["width"]
    if convnext is None:
        vision = {ALONE + name: shape for name, shape in tower.items()}
    else:
        width += convnext["dims"][-1]
        vision = {}
        for name, shape in convnext_shapes(**convnext).items():
            scale = ".blocks." in name and len(name.split(".")) == 5  # stages.s.blocks.b.weight
            name = name.removesuffix("weight") + layer_scale if scale else name
            if not name.startswith("head.fc"):
                vision[NUMBERED.format(0) + name] = shape
        vision |= {f"{NUMBERED.format(1)}vision_model.{name}": shape for name, shape in tower.items()}
    hidden = llm["hidden_size"]
    projector = norm("mlp1.0", width) | linear("mlp1.1", width, hidden) | linear("mlp1.3", hidden, hidden)
    return vision | language | projector


def siglip_config(siglip: dict) -> dict:
    """Returns SigLIP's config as released."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": siglip["width"],
        "intermediate_size": siglip["mlp"],
        "num_hidden_layers": siglip["depth"],
        "num_attention_heads": 16 if siglip["width"] == 1152 else 2,
        "num_channels": 3,
        "image_size": siglip["side"] * siglip["patch"],
        "patch_size": siglip["patch"],
        "layer_norm_eps": 1e-06,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "torch_dtype": "bfloat16",
    }


def text_config(llm: dict, *, family: str = "qwen2", tied: bool, vocab_size: int = 151936) -> dict:
    """Returns the LLM's config; the size of its vocabulary is that of before the special tokens, as it happens."""
    head = {"head_dim": llm["hidden_size"] // llm["num_attention_heads"]} if family == "qwen3" else {}
    return (
        llm
        | head
        | {
            "architectures": [f"{family.capitalize()}ForCausalLM"],
            "model_type": family,
            "vocab_size": vocab_size,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
        }
    )


def new_config(llm: dict, siglip: dict = TINY_SIGLIP, *, family: str = "qwen2", tied: bool = False) -> dict:
    """Returns a `config.json` of the generation of Eagle 2.5, with a field that nobody knows."""
    return {
        "architectures": ["Eagle2_5_VLForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_eagle2_5_vl.Eagle2_5_VLConfig"},
        "model_type": "eagle_2_5_vl",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "image_token_index": 151667,
        "loss_version": "efficient_v2_cp_head",
        "max_dynamic_tiles": 12,
        "min_dynamic_tiles": 1,
        "mlp_checkpoint": True,
        "mlp_connector_layers": 2,
        "pad2square": False,
        "select_layer": -1,
        "template": "qwen2-chat",
        "text_config": text_config(llm, family=family, tied=tied),
        "torch_dtype": "bfloat16",
        "unheard_of": [1, 2],
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_pixel_shuffle": True,
        "use_thumbnail": True,
        "vision_config": siglip_config(siglip),
    }


def old_config(llm: dict, siglip: dict = TINY_SIGLIP, *, several: bool = False, convnext_size: int = 32) -> dict:
    """Returns a `config.json` of the generation of Eagle 2."""
    vision = siglip_config(siglip)
    if several:
        vision = {
            "model_type": "MOB",
            "vision_path": f"MOB:{';'.join(MOVE)}",
            "moe_version_type": "convnext_512_siglip_448",
            "hidden_size": "lazy_calculation",
            "convnext_img_size": convnext_size,
            "siglip_vision_config": vision,
        }
    return {
        "architectures": ["Eagle2ChatModel"],
        "model_type": "eagle_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": siglip["side"] * siglip["patch"],
        "llm_config": text_config(llm, tied=False),
        "loss_version": "efficient_v2_cp_head",
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "pre_feature_reduction": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "qwen2-chat",
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": vision,
    }


SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<box>", "</box>", "<quad>", "</quad>", "<ref>", "</ref>")
TOKENS = (*SPECIAL, "<interval>", "</interval>", "<|im_start|>", "<|im_end|>")
EMBEDDINGS = "language_model.model.embed_tokens.weight"
CODE = "class Eagle2_5_VLConfig: ...\n"


def write_release(folder, config, weights, data):
    """Writes a release in three shards, with a tokenizer that has its special tokens, and code."""
    write_weights(folder, weights, shard_bytes=sum(t.nbytes for t in weights.values()) // 3 + 1)
    write_tokenizer(str(data / "tokenizer"), TOKENS, folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_eagle2_5_vl.py").write_text(CODE)
    return folder


def tied_twice(weights):
    """Returns weights in which the tied head is stored too."""
    return weights | {HEAD: weights[EMBEDDINGS].clone()}


CASES = {
    "untied-with-pooling": (new_config(TINY_LLM), released_shapes(TINY_LLM), None),
    "tied-without-pooling": (
        new_config(TINY_LLM, tied=True),
        released_shapes(TINY_LLM, tied=True, pooling=False),
        None,
    ),
    "tied-and-stored-twice": (new_config(TINY_LLM, tied=True), released_shapes(TINY_LLM, tied=True), tied_twice),
    "qwen3": (new_config(TINY_LLM, family="qwen3"), released_shapes(TINY_LLM, family="qwen3"), None),
    "old-generation": (old_config(TINY_LLM), released_shapes(TINY_LLM), None),
    "several-towers": (old_config(TINY_LLM, several=True), released_shapes(TINY_LLM, convnext=TINY_CONVNEXT), None),
    "several-towers-old-layer-scale": (
        old_config(TINY_LLM, several=True),
        released_shapes(TINY_LLM, convnext=TINY_CONVNEXT, layer_scale="weight", pooling=False),
        None,
    ),
}


def shrunk(config):
    """Returns a config whose ConvNeXt, if it has one, is tiny: a release does not tell its size."""
    encoders = config["mixture"]["encoders"]
    if "convnext" in encoders:
        sizes = {key: list(value) for key, value in TINY_CONVNEXT.items()}
        encoders = encoders | {"convnext": encoders["convnext"] | sizes}
    return config | {"mixture": config["mixture"] | {"encoders": encoders}}


def imported(release, out):
    """Imports a release; returns what became of it."""
    return import_released(release, out, shrunk(import_config(release)))
