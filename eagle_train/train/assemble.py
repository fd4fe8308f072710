"""From a composed config to the objects of a run: model, encoder of samples, schedule, data of a stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_train import dist
from eagle_train.data.catalog import Catalog, Source, build_catalog
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader
from eagle_train.data.lengths import TextLayout, ensure_indexes
from eagle_train.data.plan import PlanConfig, Rows, fingerprint, plan_rows
from eagle_train.data.recipe import load_recipe, recipe_sources
from eagle_train.data.tiling import Tiling
from eagle_train.data.tokenizer import load
from eagle_train.data.too_long import TooLong
from eagle_train.model.mixtures.base import Mixture
from eagle_train.model.prealign import PreAlignment
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.console import progress
from eagle_train.train.config import ConfigError, build
from eagle_train.train.geometry_check import check_geometry
from eagle_train.train.optim import freeze
from eagle_train.train.schedule import Stage


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How samples are laid out and read; a config's `data`.

    Args:
        tile_size: S, side in pixels of the tiles that the loader makes; encoders resize from it.
        images: how images are decoded.
        tiling: how images are cut into tiles.
        frames: how many frames a video gives.
        loss_weight: weight of a supervised token, from their number in its sample.
        too_long: what becomes of samples that are longer than a row.
        window_samples: samples packed together.
        max_bad_share: share of a source that may be bad before the run stops with the list.
        num_workers: loader processes per rank; the result does not depend on it.
    """

    tile_size: int
    images: ImageReader
    tiling: Tiling
    frames: FrameRate
    loss_weight: Callable[[int], float]
    too_long: TooLong
    window_samples: int
    max_bad_share: float
    num_workers: int


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


def assemble_model(config: Mapping[str, Any], mixture: Mixture) -> VisionLanguageModel:
    """Returns the model of a mixture and, on the current default device, its LLM and projector."""
    llm = build(config["llm"])
    projector = build(config["projector"], in_channels=mixture.channels, hidden_size=llm.config.hidden_size)
    return VisionLanguageModel(mixture=mixture, projector=projector, llm=llm, loss_chunk=config["loss_chunk"])


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


def check_stages(config: Mapping[str, Any], schedule: Mapping[str, Stage]) -> None:
    """Raises ValueError, before anything is trained, if a stage could not begin.

    That is for an encoder to align that is not there, learning rates that match nothing, or sources without shards.
    """
    model = meta_model(config)
    with torch.device("meta"):
        for stage in schedule.values():
            freeze(stage_model(config, model, stage), stage.learning_rates)
    for stage in schedule.values():
        recipe_sources(load_recipe(stage.recipe), Path(config["data_root"]))


def build_schedule(config: Mapping[str, Any]) -> dict[str, Stage]:
    """Returns the stages by name, in order."""
    return {name: build(node) for name, node in config["schedule"].items()}


def load_tokenizer(path: str):
    """Returns a fast tokenizer of a folder or hub id, see `data.tokenizer.load`.

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
    return tokenizer


def build_encoder(config: Mapping[str, Any], tokens_per_tile: int, vocab_size: int) -> Encoder:
    """Returns what lays samples out as tokens.

    Raises:
        ConfigError: if the tokenizer has more tokens than the LLM has embeddings.
    """
    tokenizer = load_tokenizer(config["tokenizer"])
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"the tokenizer at {config['tokenizer']!r} has {len(tokenizer)} tokens, the LLM {vocab_size} embeddings; "
            f"set llm.vocab_size={len(tokenizer)}"
        )
    data = build(config["data"])
    return Encoder(
        template=build(config["chat_template"]),
        tokenizer=tokenizer,
        images=data.images,
        tiling=data.tiling,
        frames=data.frames,
        tile_size=data.tile_size,
        tokens_per_tile=tokens_per_tile,
        loss_weight=data.loss_weight,
    )


@dataclass(frozen=True, kw_only=True)
class StageData:
    """A stage's samples and plan."""

    encoder: Encoder
    catalog: Catalog
    rows: Rows
    num_steps: int
    fingerprint: dict[str, str]

    def asked_shares(self) -> dict[str, float]:
        """Returns each source's share of an epoch's samples, as its repeat asks."""
        sizes = self.catalog.source_sizes()
        wanted = [s.repeat * n for s, n in zip(self.catalog.sources, sizes, strict=True)]
        return {s.name: w / sum(wanted) for s, w in zip(self.catalog.sources, wanted, strict=True)}


def build_stage_data(config: Mapping[str, Any], stage: Stage, encoder: Encoder) -> StageData:
    """Returns the samples and the plan of a stage; ranks share the building of what is missing on disk."""
    encoder = of_stage(encoder, stage)
    sources = recipe_sources(load_recipe(stage.recipe), Path(config["data_root"]))
    settings = build(config["data"])
    catalog = read_sources(config, sources, encoder, stage.max_length, settings.too_long)
    plan = PlanConfig(max_length=stage.max_length, seed=stage.seed, window_samples=settings.window_samples)
    num_rows = stage.num_steps * stage.rows_per_step if stage.num_steps is not None else None
    rows = plan_rows(catalog, plan, num_epochs=stage.num_epochs, num_rows=num_rows)
    identity = {
        "data": catalog.fingerprint,
        "repeats": {source.name: source.repeat for source in sources},
        "text": text_fingerprint(encoder),
        "images": repr(encoder.images),
        "media": [describe(encoder.tiling), asdict(encoder.frames), encoder.tile_size, encoder.tokens_per_tile],
        "plan": asdict(plan),
        "rows_per_step": stage.rows_per_step,
    }
    num_steps = -(-len(rows) // stage.rows_per_step)
    return StageData(
        encoder=encoder, catalog=catalog, rows=rows, num_steps=num_steps, fingerprint=fingerprint(identity)
    )


def of_stage(encoder: Encoder, stage: Stage) -> Encoder:
    """Returns `encoder` with the template and tiling that a stage has of its own."""
    return replace(encoder, template=stage.chat_template or encoder.template, tiling=stage.tiling or encoder.tiling)


def describe(part: Any) -> list:
    """Returns class and attributes of a small object, for fingerprints."""
    return [type(part).__name__, vars(part)]


def read_sources(
    config: Mapping[str, Any], sources: list[Source], encoder: Encoder, max_length: int, too_long: TooLong
) -> Catalog:
    """Returns the catalog of `sources`, with progress over their shards.

    The ranks first build together what indexes and text lengths are missing on disk.
    """
    name = text_fingerprint(encoder)
    text = TextLayout(template=encoder.template, tokenizer=encoder.tokenizer, fingerprint=name)
    pairs = [(shard, source.index_dir) for source in sources for shard in source.shards if shard.exists()]
    with progress("reading indexes", len(pairs)) as advance:
        ensure_indexes(pairs, text, rank=dist.rank(), world_size=dist.world_size(), progress=advance)
    share = build(config["data"]).max_bad_share
    return build_catalog(
        sources, encoder, max_length=max_length, too_long=too_long, text_fingerprint=name, max_bad_share=share
    )


def text_fingerprint(encoder: Encoder) -> str:
    """Returns a short hash of everything text lengths depend on: tokenizer and template."""
    parts = [encoder.tokenizer.backend_tokenizer.to_str(), asdict(encoder.template)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
