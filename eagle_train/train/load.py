"""A trained model for use: from the newest checkpoint of a run, or from an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from eagle_train import dist
from eagle_train.data.encode import Encoder
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import build_encoder, build_model, meta_model
from eagle_train.train.checkpoint import CheckpointDir
from eagle_train.train.zero import read_zero_weights

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
MODEL_KEYS = ("name", "mixture", "projector", "llm", "chat_template", "data", "loss_chunk")


def load_model(path: Path) -> tuple[VisionLanguageModel, Encoder]:
    """Returns the model, on this process's device in evaluation mode, and the encoder of samples.

    Args:
        path: a run folder (its newest complete checkpoint counts) or an export.

    Raises:
        ValueError: if it is neither.
    """
    config = read_config(path)
    model = build_model(config)
    weights = load_file(path / WEIGHTS) if is_export(path) else read_run_weights(path)
    load_weights(model, weights)
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    return model.to(dist.device()).eval(), encoder


def load_weights(model: VisionLanguageModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Loads weights by name; of tied ones, one name is enough.

    Raises:
        ValueError: for weights that are missing or that the model does not have.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameters[name]) for name in weights if name in parameters}
    missing = [name for name in missing if name not in parameters or id(parameters[name]) not in loaded]
    if missing or unexpected:
        raise ValueError(f"the weights do not fit the model: missing {missing[:4]}, unexpected {unexpected[:4]}")


def is_export(path: Path) -> bool:
    """Returns whether `path` is a folder that `export` wrote."""
    return (path / WEIGHTS).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """Returns the config of an export, whose tokenizer lies in it, or of a run's newest checkpoint.

    Raises:
        ValueError: if there is none.
    """
    if is_export(path):
        return yaml.safe_load((path / CONFIG).read_text()) | {"tokenizer": str(path)}
    return yaml.safe_load((newest_checkpoint(path) / CONFIG).read_text())


def newest_checkpoint(run: Path) -> Path:
    """Returns the newest complete checkpoint of a run.

    Raises:
        ValueError: if it has none, or is no run.
    """
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is neither a run nor an export: it has no {CONFIG}")
    checkpoint = CheckpointDir(run / "checkpoints").latest()
    if checkpoint is None:
        raise ValueError(f"{run} has no complete checkpoint yet")
    return checkpoint


def read_run_weights(run: Path) -> dict[str, torch.Tensor]:
    """Returns the weights in the newest complete checkpoint of a run, by parameter name."""
    checkpoint = newest_checkpoint(run)
    if (checkpoint / "engine.pt").exists():
        return torch.load(checkpoint / "engine.pt", map_location="cpu", weights_only=True)["model"]
    return read_zero_weights(checkpoint)


def export_run(run: Path, out: Path) -> Path:
    """Writes weights, config and tokenizer of a run's newest checkpoint to `out`, and checks them.

    The folder is all that `load_model` needs: it may be moved, the run deleted.

    Raises:
        ValueError: if the weights do not fit the config's model.
    """
    config = read_config(run)
    weights = read_run_weights(run)
    expected = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if expected != found:
        differing = sorted(set(expected.items()) ^ set(found.items()))[:4]
        raise ValueError(f"the weights of {run} do not fit its config: {differing}")
    encoder = build_encoder(config, tokens_per_tile=1, vocab_size=config["llm"]["vocab_size"])
    out.mkdir(parents=True, exist_ok=True)
    first_of = {tensor.data_ptr(): name for name, tensor in reversed(weights.items())}  # tied weights: once
    weights = {name: tensor.contiguous() for name, tensor in weights.items() if first_of[tensor.data_ptr()] == name}
    save_file(weights, out / WEIGHTS, {"format": "pt"})
    encoder.tokenizer.save_pretrained(out)
    (out / CONFIG).write_text(yaml.safe_dump({key: config[key] for key in MODEL_KEYS}, sort_keys=False))
    written = load_file(out / WEIGHTS)
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items()), "export differs"
    return out
