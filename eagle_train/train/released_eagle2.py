"""Released Eagle 2 and 2.5 checkpoints: into a folder that this package uses, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_train.model.checkpoints import eagle2, eagle2_config
from eagle_train.model.checkpoints.eagle2 import CONVNEXT, HEAD, SIGLIP, TOWERS, Layout, Tower
from eagle_train.model.checkpoints.eagle2_config import LLMS, NEW, OLD
from eagle_train.model.checkpoints.files import read_weights
from eagle_train.model.checkpoints.statistics import read_statistics
from eagle_train.model.mixtures.channel_concat import ChannelConcat
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import meta_model
from eagle_train.train.config import load_config
from eagle_train.train.load import CARRIED
from eagle_train.train.released import PREPROCESSOR, Carried, Imported, read_original, write_import, write_json

MIXTURES = {1: "eagle2_siglip", 2: "eagle2_move"}
"""By number of towers."""
TEMPLATES = {OLD: "eagle2", NEW: "eagle2_5"}
"""By generation: the prompts of Eagle 2's model cards, and of the processor that Eagle 2.5's repositories have."""
TIED_HEAD = "llm.lm_head.weight"
LAYOUT = "layout.json"
"""File of an import that tells which of several names the release has; see `Layout`."""


def import_config(folder: Path, experiment: str | None = None) -> dict[str, Any]:
    """Returns the config of a released checkpoint: what its `config.json` and its tensors tell, the rest our defaults.

    Args:
        experiment: whose mixture, template and data settings to take instead.

    Raises:
        ValueError: if there is no `config.json`, or one of a model that is not known.
    """
    original, weights = read_original(folder), read_weights(folder)
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    known = read_layout(original, weights)
    sizes = eagle2_config.read_encoders(original)
    if original.get("model_type") == NEW:  # the older generation has no processor; its code takes 0.5
        sizes[SIGLIP.name] |= read_statistics(Carried(folder=folder).read_json(PREPROCESSOR))
    chosen = [
        f"mixture={MIXTURES[len(sizes)]}",
        "projector=eagle2",
        "llm=toy",
        f"chat_template={TEMPLATES.get(original.get('model_type'), TEMPLATES[NEW])}",
        "data=eagle2",
        "schedule=eagle1",  # any: an import has none
        "name=imported",
        "tokenizer=imported",
    ]
    config = load_config([f"+experiment={experiment}"] if experiment else chosen)
    encoders = config["mixture"]["encoders"]
    if encoders.keys() != sizes.keys():
        raise ValueError(f"{folder} has the encoders {list(sizes)}, {experiment} {list(encoders)}; choose another one")
    encoders = {name: node | sizes[name] for name, node in encoders.items()}
    tile_size = encoders[SIGLIP.name]["image_size"]
    vocab_size = eagle2_config.read_vocab_size(shapes)
    return config | {
        "name": folder.resolve().name,
        "tokenizer": str(folder),
        "new_tokens": [],
        "mixture": config["mixture"]
        | {
            "encoders": encoders,
            "fold": {SIGLIP.name: eagle2_config.read_fold(original)},
        },
        "projector": config["projector"] | eagle2_config.read_projector(shapes),
        "llm": {"_target_": config["llm"]["_target_"]} | eagle2_config.read_llm(original, vocab_size, tied=known.tied),
        "data": config["data"] if experiment else with_tiles(config["data"], original, tile_size),
    }


def with_tiles(data: Mapping[str, Any], original: Mapping[str, Any], tile_size: int) -> dict[str, Any]:
    """Returns `data` settings whose images are cut as a release says, into tiles of `tile_size` pixels."""
    least, most, thumbnail = eagle2_config.read_tiles(original)
    told = {"tile_size": tile_size, "min_tiles": least, "max_tiles": most, "thumbnail": thumbnail}
    return dict(data) | {"tile_size": tile_size, "tiling": data["tiling"] | told}


def import_released(folder: Path, out: Path, config: Mapping[str, Any]) -> Imported:
    """Writes an export of a released checkpoint to `out`.

    Args:
        config: of the model; see `import_config`.

    Raises:
        ValueError: if `out` is not empty, or the checkpoint does not fit the config's model, with every reason.
    """
    original, weights = read_original(folder), read_weights(folder)
    known = read_layout(original, weights)
    ours = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    if known.tied:
        ours.pop(TIED_HEAD)
    found = eagle2.match({key: tensor.shape for key, tensor in weights.items()}, ours, known)
    done = write_import(folder, out, config, weights, found, tuple(tower.name for tower in known.towers.values()))
    old = any(tower.renames == eagle2.OLD_LAYER_SCALE for tower in known.towers.values())
    write_json(out / CARRIED / LAYOUT, {"old_layer_scale": old})
    return done


def read_layout(original: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Layout:
    """Returns the layout of a released checkpoint."""
    declared = bool(eagle2_config.llm_config(original).get("tie_word_embeddings", False))
    known = eagle2.layout(eagle2_config.read_towers(original), tied=eagle2.is_tied(weights, declared))
    return eagle2.as_written(known, weights.keys())


def released_layout(model: VisionLanguageModel, original: Mapping[str, Any], *, old_layer_scale: bool) -> Layout:
    """Returns the layout in which a model is written.

    Args:
        original: the `config.json` that it was imported with, if it was: it tells the order of the towers.
        old_layer_scale: see `with_old_layer_scale`.

    Raises:
        ValueError: with every reason why there is none.
    """
    if reasons := list(why_not(model)):
        raise ValueError(f"the released layout has no place for this model: {'; '.join(reasons)}")
    towers = [tower_of(encoder) for encoder in model.mixture.encoders.values()]
    if original and len(towers) > 1:
        towers = eagle2_config.read_towers(original)
    known = eagle2.layout(towers, tied=model.llm.config.tie_word_embeddings)
    if old_layer_scale:
        found = {p: eagle2.with_old_layer_scale(t) if t is CONVNEXT else t for p, t in known.towers.items()}
        known = replace(known, towers=found)
    return known


def tower_of(encoder: nn.Module) -> Tower | None:
    """Returns the tower that an encoder is, or None."""
    return {tower.encoder: tower for tower in TOWERS}.get(type(encoder))


def why_not(model: VisionLanguageModel):
    """Yields the reasons why the released layout has no place for a model."""
    mixture, llm = model.mixture, model.llm.config
    kinds = {name: tower_of(encoder) for name, encoder in mixture.encoders.items()}
    if kinds not in ({SIGLIP.name: SIGLIP}, {SIGLIP.name: SIGLIP, CONVNEXT.name: CONVNEXT}):
        told = ", ".join(f"{name} ({type(encoder).__name__})" for name, encoder in mixture.encoders.items())
        yield f"the encoders are {told}, not siglip (Siglip), or that and convnext (ConvNext)"
    if not isinstance(mixture, ChannelConcat):
        yield f"the mixture is a {type(mixture).__name__}"
    elif next(iter(kinds)) != SIGLIP.name or mixture.folds.get(CONVNEXT.name, 1) != 1:
        yield f"SigLIP is not the first encoder, or ConvNeXt is folded: {mixture.folds}"
    if any(not name.startswith("encoders.") for name, _ in mixture.named_parameters()):
        yield "the mixture has parameters of its own (layer_norm)"
    if SIGLIP in kinds.values() and isinstance(mixture.encoders[SIGLIP.name].vit.post_layernorm, nn.Identity):
        yield "SigLIP's features are not those after the last norm (select_layer)"
    if not isinstance(model.projector.layers[0], nn.LayerNorm) and len(model.projector.layers) > 1:
        yield "the projector has several layers, but does not begin with a norm"
    if llm.model_type not in LLMS.values():
        yield f"the LLM is a {llm.model_type}"


def own_weights(weights: Mapping[str, torch.Tensor], *, tied: bool) -> dict[str, torch.Tensor]:
    """Returns the weights of a model without the second name of its table of embeddings."""
    return {name: tensor for name, tensor in weights.items() if not (tied and name == TIED_HEAD)}


def with_untouched(
    written: dict[str, torch.Tensor], untouched: Mapping[str, torch.Tensor], known: Layout
) -> dict[str, torch.Tensor]:
    """Returns released weights with those that an import set aside; a second copy of the embeddings is made anew."""
    if known.tied and HEAD in untouched:
        return written | dict(untouched) | {HEAD: written[eagle2.EMBEDDINGS].clone()}
    return written | dict(untouched)
