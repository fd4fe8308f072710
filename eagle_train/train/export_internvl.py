"""A model in the layouts of InternVL2: the original code's, and that of transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eagle_train.data.encode import Encoder
from eagle_train.data.jinja import to_jinja
from eagle_train.data.tile_grids import ClosestAspectRatio
from eagle_train.data.tokenizer.added import CONFIG as TOKENIZER_CONFIG
from eagle_train.data.tokenizer.added import write_tokenizer
from eagle_train.model.checkpoints import eagle2_files, internvl, internvl_config, internvl_files
from eagle_train.model.checkpoints.eagle2 import Layout
from eagle_train.model.checkpoints.files import write_weights
from eagle_train.model.checkpoints.internvl_files import IMAGE_TOKEN, VIDEO_TOKEN
from eagle_train.model.encoders.intern_vit import InternVit
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import build_encoder, meta_model
from eagle_train.train.config import build, load_choice
from eagle_train.train.export_eagle2 import check_tokens, tiles_of
from eagle_train.train.load import check_empty, read_config, read_model_weights
from eagle_train.train.released import CONFIG, GENERATION, PREPROCESSOR, Carried, copy_code, read_carried, write_json
from eagle_train.train.released_eagle2 import own_weights, with_untouched
from eagle_train.train.released_internvl import check_layout

PLACEHOLDER = "<image>"
"""What the original code replaces by an image's tokens, start and end."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model to write, as far as its files tell of it."""

    model: VisionLanguageModel
    """On the meta device."""
    encoder: Encoder
    carried: Carried
    weights: dict[str, torch.Tensor]
    """Under original names."""

    @property
    def vit(self) -> InternVit:
        """The vision encoder."""
        return self.model.mixture.encoders[internvl.ENCODER]

    @property
    def llm(self) -> dict[str, Any]:
        """The LLM's config."""
        return self.model.llm.config.to_dict()

    @property
    def described(self) -> dict[str, Any]:
        """Arguments that the configs of both layouts take."""
        return {
            "llm": self.llm,
            "encoder": self.vit,
            "fold": self.model.mixture.folds[internvl.ENCODER],
            "dtype": str(self.weights[internvl.EMBEDDINGS].dtype).removeprefix("torch."),
        }


def export_original(path: Path, out: Path) -> list[str]:
    """Writes a run or export in the original layout; returns what the original code cannot reproduce of it.

    An LLM that was imported as an InternLM2 is written as one; others have the names that transformers gives them,
    which the original code takes too. The published code unties every head, and vLLM serves one that is in no file as
    it finds it in memory; so a tied head is written too, unless the model is of a release that does without.

    Raises:
        ValueError: if `out` is not empty, or the layout has no place for the model.
    """
    exported = read_exported(path, out)
    original = of_kind(exported.carried, internvl_config.ORIGINAL)
    weights = exported.weights
    if original and internvl_config.is_internlm2(original):
        llm = exported.llm
        weights = internvl.with_internlm2(weights, llm["num_attention_heads"], llm["num_key_value_heads"])
    if not original and exported.llm["tie_word_embeddings"]:
        weights = weights | {internvl.HEAD: weights[internvl.EMBEDDINGS].clone()}
    write_weights(out, weights)
    write_common(exported, out, path, jinja=to_jinja(exported.encoder.template, PLACEHOLDER))
    name, differing = template_name(exported.encoder, original)
    config = internvl_files.original_config(
        **exported.described, tiles=tiles_of(exported.encoder), template=name, original=original
    )
    write_json(out / CONFIG, config)
    copy_code(exported.carried, out)
    return [*differing, *differences(exported)]


def export_native(path: Path, out: Path) -> list[str]:
    """Writes a run or export in transformers' layout; returns what its classes cannot reproduce of it.

    Raises:
        ValueError: if `out` is not empty, or the layout has no place for the model.
    """
    exported = read_exported(path, out)
    write_weights(out, internvl.to_native(exported.weights))
    template = exported.encoder.template
    jinja = to_jinja(template, IMAGE_TOKEN, video_placeholder=VIDEO_TOKEN)
    write_common(exported, out, path, jinja=jinja)
    vit, tokens = exported.vit, exported.model.mixture.tokens_per_tile
    config = internvl_files.native_config(
        **exported.described,
        tokens_per_tile=tokens,
        image_token_id=exported.encoder.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    write_json(out / CONFIG, of_kind(exported.carried, internvl_config.NATIVE) | config)
    seen = {"tile_size": exported.encoder.tile_size, "mean": vit.mean, "std": vit.std}
    files = {
        PREPROCESSOR: internvl_files.preprocessor_config(**seen, tiles=tiles_of(exported.encoder)),
        "video_preprocessor_config.json": internvl_files.video_preprocessor_config(**seen),
        "processor_config.json": internvl_files.processor_config(tokens),
    }
    for name, content in files.items():
        write_json(out / name, content)
    tokenizer = json.loads((out / TOKENIZER_CONFIG).read_text()) if (out / TOKENIZER_CONFIG).is_file() else {}
    write_json(out / TOKENIZER_CONFIG, internvl_files.with_media_tokens(tokenizer))
    return list(differences(exported))


def read_exported(path: Path, out: Path) -> Exported:
    """Returns a run or export, read.

    Raises:
        ValueError: if `out` is not empty, or InternVL's layouts have no place for the model or its prompts.
    """
    check_empty(out)
    config = read_config(path)
    model, carried = meta_model(config), read_carried(path, config)
    check_layout(model)
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    check_tokens(encoder)
    tied = model.llm.config.tie_word_embeddings
    ours = own_weights(read_model_weights(path), tied=tied)
    written = {internvl.to_original(name): tensor for name, tensor in ours.items()}
    weights = with_untouched(written, carried.weights, Layout(towers={}, tied=tied))
    return Exported(model=model, encoder=encoder, carried=carried, weights=weights)


def write_common(exported: Exported, out: Path, path: Path, *, jinja: str) -> None:
    """Writes tokenizer, chat template and generation config."""
    config, encoder = read_config(path), exported.encoder
    write_tokenizer(config["tokenizer"], config["new_tokens"], out)
    tokenizer = encoder.tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    generation = eagle2_files.generation_config(encoder.template.stop_ids(tokenizer), ids)
    write_json(out / GENERATION, exported.carried.read_json(GENERATION) | generation)
    (out / "chat_template.jinja").write_text(jinja)


def of_kind(carried: Carried, model_type: str) -> dict[str, Any]:
    """Returns the `config.json` that a model was imported with, if that was one of this layout."""
    config = carried.read_json(CONFIG)
    return config if config.get("model_type") == model_type else {}


def template_name(encoder: Encoder, original: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Returns the original code's name of a chat template, and what differs if it has none that is the same."""
    for name, ours in internvl_config.TEMPLATES.items():
        if build(load_choice("chat_template", ours)) == encoder.template:
            return name, []
    name = original.get("template", "Hermes-2")
    return name, [f"its prompts are those of the template {name}, not those that it was trained with"]


def differences(exported: Exported) -> Iterator[str]:
    """Yields in what a model differs from what the published code does with its files."""
    encoder, vit = exported.encoder, exported.vit
    if not isinstance(encoder.tiling, ClosestAspectRatio):
        yield f"images are cut by ClosestAspectRatio there, by {type(encoder.tiling).__name__} here"
    if encoder.tile_size != vit.input_size:
        yield f"tiles have the {vit.input_size} px of InternViT there, {encoder.tile_size} px here"
