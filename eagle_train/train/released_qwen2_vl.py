"""Released Qwen2-VL checkpoints: into a folder that this package uses, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eagle_train.data.chat import ChatTemplate
from eagle_train.data.encode import Encoder
from eagle_train.data.positions import multimodal_rotary
from eagle_train.data.smart_resize import SmartResize
from eagle_train.data.tokenizer.added import write_tokenizer
from eagle_train.model.checkpoints import qwen2_vl, qwen2_vl_config
from eagle_train.model.checkpoints.files import read_weights, write_weights
from eagle_train.model.checkpoints.qwen2_vl import EMBEDDINGS, ENCODER, HEAD
from eagle_train.model.checkpoints.qwen2_vl_config import CHAT_TEMPLATE, TOKENS
from eagle_train.model.encoders.qwen2_vit import Qwen2Vit
from eagle_train.model.projector import PatchMerger
from eagle_train.model.qwen2_vl_llm import Qwen2VLCausalLM
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import build_encoder, meta_model
from eagle_train.train.config import build, load_choice, load_config
from eagle_train.train.load import check_empty, read_config, read_model_weights
from eagle_train.train.released import (
    CONFIG,
    GENERATION,
    PREPROCESSOR,
    Carried,
    Imported,
    read_carried,
    read_original,
    write_import,
    write_json,
)
from eagle_train.types import Message

TIED_HEAD = "llm.lm_head.weight"
TEMPLATE = "qwen2_vl"
"""Our chat template whose prompts are those of `CHAT_TEMPLATE`."""
PARTS = ("mixture=qwen2_vl", "projector=qwen2_vl", "llm=qwen2_vl_2b", "data=qwen2_vl", "degrade=frames_then_pixels")


def import_config(folder: Path, experiment: str | None = None) -> dict[str, Any]:
    """Returns the config of a released checkpoint: what its files and its tensors tell, the rest our defaults.

    Args:
        experiment: whose template and data settings to take instead.

    Raises:
        ValueError: if there is no `config.json`, or one of another model.
    """
    original, weights = read_original(folder), read_weights(folder)
    preprocessor = Carried(folder=folder).read_json(PREPROCESSOR)
    chosen = [*PARTS, "chat_template=qwen2_vl", "schedule=eagle1", "name=imported", "tokenizer=imported"]
    config = load_config([f"+experiment={experiment}"] if experiment else chosen)
    encoder = config["mixture"]["encoders"].get(ENCODER)
    if encoder is None:
        raise ValueError(f"{folder} is a Qwen2-VL, but {experiment} has no encoder {ENCODER!r}; choose another one")
    if EMBEDDINGS not in weights:
        raise ValueError(f"the checkpoint has no {EMBEDDINGS}")
    encoder = encoder | qwen2_vl_config.read_encoder(original, preprocessor) | {"pretrained": None}
    data = config["data"]
    if experiment is None:
        side = encoder["patch_size"] * encoder["merge"]
        tiling = {"tile_size": side, "tile_depth": encoder["frames"]} | qwen2_vl_config.read_bounds(preprocessor)
        data = data | {"tile_size": side, "tiling": data["tiling"] | tiling}
    tied = qwen2_vl.is_tied(weights, qwen2_vl_config.is_tied(original))
    llm = qwen2_vl_config.read_llm(original, len(weights[EMBEDDINGS]), tied=tied)
    return config | {
        "name": folder.resolve().name,
        "tokenizer": str(folder),
        "new_tokens": [],
        "mixture": config["mixture"] | {"encoders": {ENCODER: encoder}},
        "projector": config["projector"] | {"patches": encoder["merge"] ** 2, "pretrained": None},
        "llm": {"_target_": "eagle_train.model.qwen2_vl_llm.build_qwen2_vl_llm"} | llm,
        "data": data,
    }


def import_released(folder: Path, out: Path, config: Mapping[str, Any]) -> Imported:
    """Writes an export of a released checkpoint to `out`.

    Args:
        config: of the model; see `import_config`.

    Raises:
        ValueError: if `out` is not empty, or the checkpoint does not fit the config's model, with every reason.
    """
    weights, model = read_weights(folder), meta_model(config)
    ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = config["llm"]["tie_word_embeddings"]
    if tied:
        ours.pop(TIED_HEAD)
    found = qwen2_vl.match({key: tensor.shape for key, tensor in weights.items()}, ours, tied=tied)
    return write_import(folder, out, config, weights, found, (ENCODER,))


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model to write, as far as its files tell of it."""

    model: VisionLanguageModel
    """On the meta device."""
    encoder: Encoder
    carried: Carried
    dtype: torch.dtype


def export_released(path: Path, out: Path) -> list[str]:
    """Writes a run or export as on the hub; returns what transformers cannot reproduce of it.

    Raises:
        ValueError: if `out` is not empty, or the layout has no place for the model.
    """
    check_empty(out)
    config = read_config(path)
    model, carried = meta_model(config), read_carried(path, config)
    if reasons := list(why_not(model)):
        raise ValueError(f"the released layout has no place for this model: {'; '.join(reasons)}")
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    if missing := [token for token in TOKENS.values() if encoder.tokenizer.convert_tokens_to_ids(token) is None]:
        raise ValueError(f"the tokenizer lacks {missing}, which the released layout needs; list them in new_tokens")
    tied = model.llm.config.tie_word_embeddings
    ours = {name: t for name, t in read_model_weights(path).items() if not (tied and name == TIED_HEAD)}
    written = {qwen2_vl.to_released(name): tensor for name, tensor in ours.items()}
    kept = dict(carried.weights)
    if tied and HEAD in kept:  # a second copy of the embeddings is made anew: they may have been trained
        kept[HEAD] = written[EMBEDDINGS].clone()
    write_weights(out, written | kept)
    write_tokenizer(config["tokenizer"], config["new_tokens"], out)
    dtype = ours["llm.model.embed_tokens.weight"].dtype
    write_files(Exported(model=model, encoder=encoder, carried=carried, dtype=dtype), out)
    return list(differences(encoder))


def why_not(model: VisionLanguageModel) -> Iterator[str]:
    """Yields the reasons why the released layout has no place for a model."""
    encoders = model.mixture.encoders
    if list(encoders) != [ENCODER] or not isinstance(encoders[ENCODER], Qwen2Vit):
        told = ", ".join(f"{name} ({type(encoder).__name__})" for name, encoder in encoders.items())
        yield f"the encoders are {told}, not {ENCODER} (Qwen2Vit) alone"
    if not isinstance(model.projector, PatchMerger):
        yield f"the projector is a {type(model.projector).__name__}"
    if not isinstance(model.llm, Qwen2VLCausalLM):
        yield f"the LLM is a {model.llm.config.model_type}"


def write_files(exported: Exported, out: Path) -> None:
    """Writes everything but weights and tokenizer."""
    model, encoder, carried = exported.model, exported.encoder, exported.carried
    vit, tokenizer = model.mixture.encoders[ENCODER], encoder.tokenizer
    config = qwen2_vl_config.write_config(
        llm=model.llm.config.to_dict(),
        vision=describe_vision(model),
        ids={name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()},
        tied=model.llm.config.tie_word_embeddings,
        dtype=str(exported.dtype).removeprefix("torch."),
        original=carried.read_json(CONFIG),
    )
    write_json(out / CONFIG, config)
    preprocessor = qwen2_vl_config.preprocessor_config(
        patch_size=vit.patch_size,
        frames=vit.frames,
        merge=vit.merge,
        mean=vit.mean,
        std=vit.std,
        bounds=(encoder.tiling.min_pixels, encoder.tiling.max_pixels),
    )
    theirs = {name: value for name, value in carried.read_json(PREPROCESSOR).items() if name != "size"}
    write_json(out / PREPROCESSOR, theirs | preprocessor)
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    generation = {"eos_token_id": encoder.template.stop_ids(tokenizer)}
    generation |= {name: token for name, token in ids.items() if token is not None}
    write_json(out / GENERATION, carried.read_json(GENERATION) | generation)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def describe_vision(model: VisionLanguageModel) -> dict[str, Any]:
    """Returns the `vision_config` of a model."""
    vit = model.mixture.encoders[ENCODER]
    width = vit.patch_embed.out_channels
    return {
        "model_type": "qwen2_vl_vision",
        "depth": len(vit.blocks),
        "embed_dim": width,
        "hidden_size": model.llm.config.hidden_size,
        "hidden_act": "quick_gelu",
        "in_channels": 3,
        "mlp_ratio": vit.blocks[0].mlp["fc1"].out_features // width,
        "num_heads": vit.blocks[0].num_heads,
        "patch_size": vit.patch_size,
        "spatial_merge_size": vit.merge,
        "temporal_patch_size": vit.frames,
    }


def differences(encoder: Encoder) -> Iterator[str]:
    """Yields in what a model differs from what transformers does with its files."""
    if not isinstance(encoder.tiling, SmartResize) or encoder.positions is not multimodal_rotary:
        yield "pictures are of native resolution with positions of time, rows and columns there"
    elif encoder.tiling.resample != "bicubic":
        yield f"pictures are resized bicubic there, {encoder.tiling.resample} here"
    template, media = encoder.template, encoder.template.media
    if spoken(template) != spoken(build(load_choice("chat_template", TEMPLATE))):
        yield f"prompts are those of chat_template={TEMPLATE} there, others here"
    if media.images.partition("{number}")[0] not in ("", "Picture "):
        yield f"images are numbered as Picture 1 there, if at all; here by {media.images!r}"


def spoken(template: ChatTemplate) -> list[str | int]:
    """Returns a conversation about an image as a template writes it, whatever of it is learnt."""
    turns = (("user", ("See", 0, "?")), ("assistant", ("So.",)), ("user", ("Why?",)), ("assistant", ("So.",)))
    items = template.render([Message(role=role, content=content) for role, content in turns])
    ends = [template.media.prefix, template.media.suffix]
    return [item if isinstance(item, int) else "".join(text for text, _ in item) for item in items] + ends
