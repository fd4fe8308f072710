"""Published InternVL2 checkpoints, original or transformers' own: into a folder that this package uses, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_train.model.checkpoints import eagle2, eagle2_config, internvl, internvl_config
from eagle_train.model.checkpoints.files import read_weights
from eagle_train.model.checkpoints.statistics import read_statistics
from eagle_train.model.encoders.intern_vit import InternVit
from eagle_train.model.mixtures.channel_concat import ChannelConcat
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import meta_model
from eagle_train.train.config import load_config
from eagle_train.train.released import PREPROCESSOR, Carried, Imported, read_original, write_import
from eagle_train.train.released_eagle2 import TIED_HEAD, with_tiles


def import_config(folder: Path, experiment: str | None = None) -> dict[str, Any]:
    """Returns the config of a published checkpoint: what its files and its tensors tell, the rest our defaults.

    Args:
        experiment: whose mixture, template and data settings to take instead.

    Raises:
        ValueError: if there is no `config.json`, or one of a model that is not known.
    """
    original = read_original(folder)
    weights = original_weights(original, read_weights(folder))
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    chosen = [f"+experiment={experiment}"]
    if experiment is None:
        chosen = [
            "mixture=internvl2",
            "projector=eagle2",
            "llm=toy",
            f"chat_template={internvl_config.read_template(original)}",
            "data=internvl",
            "degrade=internvl2",
            "schedule=eagle1",  # any: an import has none
            "name=imported",
            "tokenizer=imported",
        ]
    config = load_config(chosen)
    encoders = config["mixture"]["encoders"]
    if list(encoders) != [internvl.ENCODER]:
        raise ValueError(f"{folder} has the encoder {internvl.ENCODER}, {experiment} {list(encoders)}; choose another")
    preprocessor = Carried(folder=folder).read_json(PREPROCESSOR)
    sizes = internvl_config.read_encoder(original)
    if original.get("model_type") == internvl_config.NATIVE:  # the original code takes ImageNet's whatever it says
        sizes |= read_statistics(preprocessor)
    vocab_size = eagle2_config.read_vocab_size(shapes)
    llm = eagle2_config.read_llm(
        {"llm_config": internvl_config.llm_config(original)}, vocab_size, tied=is_tied(original, weights)
    )
    tiles = internvl_config.read_tiles(original, preprocessor)
    found = {
        "name": folder.resolve().name,
        "tokenizer": str(folder),
        "new_tokens": [],
        "mixture": config["mixture"]
        | {
            "encoders": {internvl.ENCODER: encoders[internvl.ENCODER] | sizes},
            "fold": {internvl.ENCODER: internvl_config.read_fold(original)},
        },
        "projector": config["projector"] | eagle2_config.read_projector(shapes),
        "llm": {"_target_": config["llm"]["_target_"]} | llm,
    }
    if experiment is None:
        keys = ("dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")
        told = dict(zip(keys, (tiles[1] > 1, *tiles), strict=True))
        found["data"] = with_tiles(config["data"], told, sizes["image_size"])
        found["degrade"] = config["degrade"] | {"max_tiles": tiles[1]}
    return config | found


def import_released(folder: Path, out: Path, config: Mapping[str, Any]) -> Imported:
    """Writes an export of a published checkpoint to `out`.

    Args:
        config: of the model; see `import_config`.

    Raises:
        ValueError: if `out` is not empty, or the checkpoint does not fit the config's model, with every reason.
    """
    original = read_original(folder)
    weights = original_weights(original, read_weights(folder))
    ours = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    tied = is_tied(original, weights)
    if tied:
        ours.pop(TIED_HEAD)
    found = internvl.match({key: tensor.shape for key, tensor in weights.items()}, ours, tied=tied)
    return write_import(folder, out, config, weights, found, (internvl.ENCODER,))


def original_weights(original: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a checkpoint's weights under the original names, those of an LLM that transformers has.

    Args:
        original: its `config.json`.
    """
    if internvl.is_native(weights.keys()):
        return internvl.from_native(weights)
    if internvl_config.is_internlm2(original):
        llm = internvl_config.llm_config(original)
        return internvl.with_llama(weights, llm["num_attention_heads"], llm["num_key_value_heads"])
    return dict(weights)


def is_tied(original: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether the LM head is the table of embeddings.

    Transformers' layout leaves a head out where it is; where one is stored that differs, it is not, whatever the
    config says.
    """
    return eagle2.is_tied(weights, internvl_config.is_tied(original))


def check_layout(model: VisionLanguageModel) -> None:
    """Raises ValueError, with every reason, if InternVL's layouts have no place for a model."""
    if reasons := list(why_not(model)):
        raise ValueError(f"InternVL's layout has no place for this model: {'; '.join(reasons)}")


def why_not(model: VisionLanguageModel):
    """Yields the reasons why InternVL's layouts have no place for a model."""
    mixture, layers = model.mixture, model.projector.layers
    if {name: type(encoder) for name, encoder in mixture.encoders.items()} != {internvl.ENCODER: InternVit}:
        told = ", ".join(f"{name} ({type(encoder).__name__})" for name, encoder in mixture.encoders.items())
        yield f"the encoders are {told}, not {internvl.ENCODER} (InternVit)"
    if not isinstance(mixture, ChannelConcat):
        yield f"the mixture is a {type(mixture).__name__}"
    elif mixture.folds.get(internvl.ENCODER, 1) == 1:
        yield "the features are not folded (mixture.fold)"
    if any(not name.startswith("encoders.") for name, _ in mixture.named_parameters()):
        yield "the mixture has parameters of its own (layer_norm)"
    if [type(layer) for layer in layers] != [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]:
        yield "the projector is not a norm and two layers (projector=eagle2)"
    if model.llm.config.model_type not in eagle2_config.LLMS.values():
        yield f"the LLM is a {model.llm.config.model_type}"
