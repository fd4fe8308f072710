"""From a composed config to the objects of a run: model, encoder of samples, schedule, data of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_train.data.encode import Encoder
from eagle_train.data.images import ImageReader
from eagle_train.data.loss_weights import LossWeight
from eagle_train.data.positions import Positions
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import card_source, recipe_sources
from eagle_train.data.storage import Storage
from eagle_train.data.tiling import Tiling
from eagle_train.data.tokenizer import load
from eagle_train.data.tokenizer.added import add_special_tokens, num_written
from eagle_train.data.too_long import TooLong
from eagle_train.data.video_frames import VideoDecoder
from eagle_train.model.embeddings import Vocabulary
from eagle_train.model.lora import Lora
from eagle_train.model.mixtures.base import Mixture
from eagle_train.model.prealign import PreAlignment
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.config import ConfigError, build, constructor
from eagle_train.train.geometry_check import check_geometry
from eagle_train.train.optim import freeze, parameter_groups
from eagle_train.train.placement import Placement
from eagle_train.train.schedule import Stage
from eagle_train.train.sequence.spread import check_group


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How samples are laid out and read; a config's `data`.

    Args:
        tile_size: S, side in pixels of the tiles that the loader makes; encoders of flat tiles resize from it.
        images: how images are decoded.
        videos: what decodes videos.
        tiling: how images are cut into tiles.
        loss_weight: weights of a sample's tokens, from which of them are supervised.
        positions: the position ids of a sample.
        too_long: what becomes of samples that are longer than a row.
        window_rows: rows packed together.
        storage: how shards are read.
        quarantine: file with the keys of samples that are left out.
        max_bad_share: share of a source that may be bad before the run stops with the list.
        max_too_long_share: share of a source that may be left out because it is too long; more stops the run.
        num_workers: loader processes per rank; the result does not depend on it.
        prefetch: rows that each of them makes ahead.
        index_workers: processes per rank that build missing indexes before a stage; null: as many as `num_workers`,
            which have nothing to do then, but at least 1.
    """

    tile_size: int
    images: ImageReader
    videos: VideoDecoder
    tiling: Tiling
    loss_weight: LossWeight
    positions: Positions
    too_long: TooLong
    window_rows: int
    max_bad_share: float
    max_too_long_share: float
    num_workers: int
    prefetch: int
    index_workers: int | None
    storage: Storage
    quarantine: str | None


def build_model(config: Mapping[str, Any]) -> VisionLanguageModel:
    """Returns the model on the current default device.

    Raises:
        ConfigError: with every reason, if encoders, mixture and rows do not fit together.
    """
    check_geometry(config)
    return assemble_model(config, build(config["mixture"]))


def meta_model(config: Mapping[str, Any]) -> VisionLanguageModel:
    """Returns the model on the meta device: shapes and names without memory.

    Raises:
        ConfigError: as `build_model`.
    """
    mixture = check_geometry(config)
    with torch.device("meta"):
        return assemble_model(config, mixture)


def trained_meta_model(config: Mapping[str, Any]) -> VisionLanguageModel:
    """Returns the model as the stages train it, with the config's adapters, on the meta device.

    Raises:
        ConfigError, ValueError: as `build_model` and `add_adapters`.
    """
    model = meta_model(config)
    with torch.device("meta"):
        add_adapters(config, model)
    return model


def assemble_model(config: Mapping[str, Any], mixture: Mixture) -> VisionLanguageModel:
    """Returns the model of a mixture and, on the current default device, its LLM and projector."""
    llm = build(config["llm"])
    projector = build(config["projector"], in_channels=mixture.channels, hidden_size=llm.config.hidden_size)
    return VisionLanguageModel(
        mixture=mixture,
        projector=projector,
        llm=llm,
        loss=build(config["loss"]),
        attention=build(config["attention"]) if "attention" in config else None,  # exports do not have it
    )


def adapters(config: Mapping[str, Any]) -> dict[str, Lora]:
    """Returns the adapters of a config, by the name of the module that has them; none where there is no `lora`."""
    return build(config.get("lora") or {})


def add_adapters(config: Mapping[str, Any], model: VisionLanguageModel) -> None:
    """Puts a config's adapters on the model, whose weights are loaded.

    Raises:
        ConfigError: for a module that is not there.
        ValueError: for targets that are not there or no linear layers.
    """
    for name, lora in adapters(config).items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            known = ["llm", "projector", *(f"mixture.encoders.{encoder}" for encoder in model.mixture.encoders)]
            raise ConfigError(f"lora: there is no module {name!r}; there are {', '.join(known)}") from error
        lora.add_to(name, module)


def build_placement(engine: Mapping[str, Any]) -> Placement:
    """Returns where the weights of a run lie, as its engine wants it.

    Args:
        engine: a config's `engine`.
    """
    fields = {key: value for key, value in engine.items() if not key.startswith("_")}
    return constructor(engine).weights(**fields)


def stage_model(config: Mapping[str, Any], model: VisionLanguageModel, stage: Stage) -> nn.Module:
    """Returns what a stage trains: the model, or one of its encoders behind a projector like the model's.

    Raises:
        ValueError: if there is no such encoder, or the mixture does not allow it (see `PreAlignment`).
    """
    if stage.align is None:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.seed)
        return PreAlignment(model, stage.align, partial(build, config["projector"]))


def check_stages(config: Mapping[str, Any], model: VisionLanguageModel, schedule: Mapping[str, Stage]) -> None:
    """Raises ValueError, before anything is trained, if a stage could not begin.

    That is for an encoder to align that is not there, learning rates or weight decays that match nothing, sources
    without shards, ranks that cannot share this LLM's rows, or an evaluation of sources that the recipe lacks.

    Args:
        model: on the meta device.
    """
    check_group(model, config["engine"]["sequence_parallel"])
    with torch.device("meta"):
        for stage in schedule.values():
            trained = stage_model(config, model, stage)
            freeze(trained, stage.learning_rates, adapters(config))
            parameter_groups(trained, stage)
    missing = []
    for name in dict.fromkeys(stage.recipe for stage in schedule.values()):
        try:
            recipe_sources(load_recipe(name), Path(config["data_root"]))
        except ValueError as error:
            missing.append(str(error))
    try:
        check_evaluation(config, list(schedule.values())[-1].recipe)
    except ValueError as error:
        missing.append(str(error))
    if missing:
        raise ValueError("\n".join(dict.fromkeys(missing)))


def check_evaluation(config: Mapping[str, Any], last: str) -> None:
    """Raises ValueError if the evaluation at the end of a run asks for sources that it could not read.

    They are those that the last stage's recipe does not have, or that have no shards.

    Args:
        last: the last stage's recipe.
    """
    if not config["evaluation"]:
        return
    recipe, sources = load_recipe(last), build(config["evaluation"]).sources
    if lacking := [name for name in sources if name not in recipe.cards]:
        raise ValueError(
            f"evaluation asks for {', '.join(lacking)}, which recipe {recipe.name} of the last stage does not have; "
            f"set evaluation=none, or evaluation.sources=[...] to held-out sources that the recipe names"
        )
    for name in sources:
        card_source(recipe, name, Path(config["data_root"]))


def build_schedule(config: Mapping[str, Any]) -> dict[str, Stage]:
    """Returns the stages by name, in order."""
    return {name: build(node) for name, node in config["schedule"].items()}


def load_tokenizer(path: str, new_tokens: Sequence[str] = ()):
    """Returns a fast tokenizer of a folder or hub id, see `data.tokenizer.load`.

    Args:
        new_tokens: special tokens that it gets, in this order, unless it has them.

    Raises:
        ConfigError: if there is none, or none that can be used.
    """
    try:
        tokenizer = load.load_tokenizer(path, load.default_cache())
    except OSError as error:
        raise ConfigError(f"no tokenizer at {path!r} ({str(error).splitlines()[0]}); set tokenizer=FOLDER") from error
    except ValueError as error:
        raise ConfigError(f"the tokenizer at {path!r}: {error}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer at {path!r} gives no offsets; a tokenizer.json is needed")
    add_special_tokens(tokenizer, new_tokens)
    return tokenizer


def build_vocabulary(config: Mapping[str, Any], tokenizer) -> Vocabulary:
    """Returns the tokens of a run's tokenizer, which has its `new_tokens`, for its LLM's tables."""
    new = tokenizer.convert_tokens_to_ids(config["new_tokens"])
    return Vocabulary(num_tokens=len(tokenizer), new=tuple(new))


def build_encoder(config: Mapping[str, Any], tokens_per_tile: int, vocab_size: int) -> Encoder:
    """Returns what lays samples out as tokens.

    Raises:
        ConfigError: if the tokenizer has more tokens than the LLM has embeddings, or lacks one of the template's.
    """
    tokenizer = load_tokenizer(config["tokenizer"], config["new_tokens"])
    template = build(config["chat_template"])
    if missing := template.missing_tokens(tokenizer):
        raise ConfigError(
            f"the tokenizer at {config['tokenizer']!r} does not have {', '.join(missing)} of the chat template; list "
            f"them in new_tokens, or choose another chat_template"
        )
    if (needed := num_written(tokenizer, f"{config['chat_template']} {config['new_tokens']}")) > vocab_size:
        raise ConfigError(
            f"the tokenizer at {config['tokenizer']!r} has {needed} tokens, the LLM {vocab_size} embeddings; "
            f"set llm.vocab_size={needed}; rows that are added start as the mean of the others"
        )
    data = build(config["data"])
    return Encoder(
        template=template,
        tokenizer=tokenizer,
        images=data.images,
        videos=data.videos,
        tiling=data.tiling,
        degrade=build(config["degrade"]),
        tile_size=data.tile_size,
        tokens_per_tile=tokens_per_tile,
        loss_weight=data.loss_weight,
        positions=data.positions,
    )
