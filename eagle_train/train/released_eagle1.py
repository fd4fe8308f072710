"""Released Eagle 1 checkpoints: into a folder that this package uses, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_train.data.tokenizer.added import write_tokenizer
from eagle_train.model.checkpoints.eagle1 import (
    PROJECTOR,
    TOWERS,
    Tower,
    match,
    to_released,
    unused_parts,
)
from eagle_train.model.checkpoints.eagle1_config import read_llm, read_projector_depth, read_towers, write_config
from eagle_train.model.checkpoints.files import read_weights, write_weights
from eagle_train.model.mixtures.channel_concat import ChannelConcat
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import meta_model
from eagle_train.train.config import load_config
from eagle_train.train.load import check_empty, read_config, read_model_weights
from eagle_train.train.released import (
    CONFIG,
    GENERATION,
    Imported,
    read_carried,
    read_original,
    write_import,
    write_json,
)

TEMPLATES = {32000: "vicuna_v1", 64000: "yi_chatml", 128256: "llama3_parity", 128257: "llama3_parity"}
"""By size of the vocabulary: Vicuna's, Yi's, Llama 3's without and with a padding token."""
TOKENS_PER_TILE = 1024
"""Visual tokens per image, a constant of the original code."""


def import_config(folder: Path, experiment: str | None = None) -> dict[str, Any]:
    """Returns the config of a released checkpoint: what its `config.json` tells, the rest from the parity preset.

    Args:
        experiment: whose mixture, template and data settings to take instead.

    Raises:
        ValueError: if there is no `config.json`, or one of a model that is not known.
    """
    original = read_original(folder)
    towers, llm = read_towers(original), read_llm(original)
    if experiment is None and llm["vocab_size"] not in TEMPLATES:
        raise ValueError(
            f"which template a vocabulary of {llm['vocab_size']} tokens uses is not known; give --experiment"
        )
    config = load_config(
        [f"+experiment={experiment}"]
        if experiment
        else [
            "mixture=eagle_x5_parity",
            "llm=vicuna_7b",
            f"chat_template={TEMPLATES[llm['vocab_size']]}",
            "data=eagle1",
            "schedule=eagle1",
            "name=imported",
            "tokenizer=imported",
        ]
    )
    encoders = config["mixture"]["encoders"]
    if absent := [name for name in towers if name not in encoders]:
        raise ValueError(f"{experiment} has no encoders {absent}, which {folder} has; choose another --experiment")
    return config | {
        "name": folder.resolve().name,
        "tokenizer": str(folder),
        "mixture": config["mixture"] | {"encoders": {name: encoders[name] for name in towers}},
        "projector": config["projector"] | {"depth": read_projector_depth(original)},
        "llm": {"_target_": config["llm"]["_target_"]} | llm,
    }


def import_released(folder: Path, out: Path, config: Mapping[str, Any]) -> Imported:
    """Writes an export of a released checkpoint to `out`; tensors are mapped from file to file, never all in memory.

    Args:
        config: of the model; see `import_config`.

    Raises:
        ValueError: if `out` is not empty, or the checkpoint does not fit the config's model, with every reason.
    """
    towers = read_towers(read_original(folder))
    weights = read_weights(folder)
    shapes = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    found = match({key: tensor.shape for key, tensor in weights.items()}, shapes, towers)
    return write_import(folder, out, config, weights, found, tuple(towers))


def export_released(path: Path, out: Path) -> list[str]:
    """Writes a run or export in the released layout; returns what the original code cannot reproduce of it.

    Unused tensors are those of the release that the model or its `init_from` was imported from; without one, they
    are written neutral, since the original code expects them.

    Raises:
        ValueError: if `out` is not empty, or the layout has no place for the model.
    """
    check_empty(out)
    config = read_config(path)
    model = meta_model(config)
    towers = released_towers(model)
    carried = read_carried(path, config)
    weights = {to_released(name, towers): tensor for name, tensor in read_model_weights(path).items()}
    weights |= unused_parts(weights, towers) | carried.weights
    write_weights(out, weights)
    write_tokenizer(config["tokenizer"], config["new_tokens"], out)
    dtype = weights["lm_head.weight"].dtype
    write_json(out / CONFIG, describe(model, towers, dtype, config, carried.read_json(CONFIG)))
    if generation := carried.read_json(GENERATION):  # without one, transformers makes it of `config.json`
        write_json(out / GENERATION, generation)
    return differences(model, towers)


def export_projector(path: Path, out: Path) -> list[str]:
    """Writes LLaVA's `mm_projector.bin` and `config.json` of a run or export; returns as `export_released`.

    Raises:
        ValueError: if `out` is not empty, or the layout has no place for the model.
    """
    check_empty(out)
    config = read_config(path)
    model = meta_model(config)
    towers = released_towers(model)
    weights = {
        to_released(name, towers): tensor.clone()
        for name, tensor in read_model_weights(path).items()
        if name.startswith(PROJECTOR[1])
    }
    out.mkdir(parents=True, exist_ok=True)
    torch.save(weights, out / "mm_projector.bin")
    dtype = next(iter(weights.values())).dtype
    write_json(out / CONFIG, describe(model, towers, dtype, config, {}) | {"tune_mm_mlp_adapter": True})
    return differences(model, towers)


def released_towers(model: VisionLanguageModel) -> dict[str, Tower]:
    """Returns the towers of a model by the names of its encoders, in order.

    Raises:
        ValueError: with every reason why the released layout has no place for it.
    """
    kinds = {tower.encoder: tower for tower in TOWERS}
    encoders = model.mixture.encoders
    reasons = [
        f"encoder {name} is a {type(encoder).__name__}"
        for name, encoder in encoders.items()
        if type(encoder) not in kinds
    ]
    if len({type(encoder) for encoder in encoders.values()}) < len(encoders):
        reasons.append("two encoders are of one kind")
    if not isinstance(model.mixture, ChannelConcat):
        reasons.append(f"the mixture is a {type(model.mixture).__name__}")
    if any(not name.startswith("encoders.") for name, _ in model.mixture.named_parameters()):
        reasons.append("the mixture has parameters of its own (layer_norm)")
    if not isinstance(model.projector.layers[0], nn.Linear):
        reasons.append("the projector begins with a norm (layer_norm)")
    if model.llm.config.model_type != "llama" or model.llm.config.tie_word_embeddings:
        reasons.append("the LLM is no untied Llama")
    if reasons:
        raise ValueError(f"the released layout has no place for this model: {'; '.join(reasons)}")
    return {name: kinds[type(encoder)] for name, encoder in encoders.items()}


def differences(model: VisionLanguageModel, towers: Mapping[str, Tower]) -> list[str]:
    """Returns in what a model differs from what the original code builds for these towers."""
    found = []
    for name, tower in towers.items():
        encoder = model.mixture.encoders[name]
        count = sum(parameter.numel() for parameter in encoder.parameters())
        theirs, ours = (tower.input_size, tower.num_parameters), (encoder.input_size, count)
        if theirs != ours:
            found.append(f"{tower.released} has (pixels, parameters) {theirs} there, {name} has {ours} here")
    if model.mixture.tokens_per_tile != TOKENS_PER_TILE:
        found.append(f"an image has {TOKENS_PER_TILE} tokens there, {model.mixture.tokens_per_tile} here")
    return found


def describe(
    model: VisionLanguageModel,
    towers: Mapping[str, Tower],
    dtype: torch.dtype,
    config: Mapping[str, Any],
    original: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the `config.json` of a model; its samples' length is the schedule's longest, or the LLM's."""
    lengths = [stage["max_length"] for stage in config.get("schedule", {}).values()]
    return write_config(
        model.llm.config.to_dict(),
        towers,
        depth=sum(isinstance(layer, nn.Linear) for layer in model.projector.layers),
        dtype=str(dtype).removeprefix("torch."),
        max_length=max(lengths, default=model.llm.config.max_position_embeddings),
        original=original,
    )
