"""A trained model for use: from the newest checkpoint of a run, or from an export."""

from __future__ import annotations

import json
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
    model.load_state_dict(weights)
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    return model.to(dist.device()).eval(), encoder


def is_export(path: Path) -> bool:
    """Returns whether `path` is a folder that `export` wrote."""
    return (path / WEIGHTS).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """Returns the config of a run or an export; an export's tokenizer lies in it.

    Raises:
        ValueError: if there is none.
    """
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path} is neither a run nor an export: it has no {CONFIG}")
    config = yaml.safe_load((path / CONFIG).read_text())
    return config | ({"tokenizer": str(path)} if is_export(path) else {})


def read_run_weights(run: Path) -> dict[str, torch.Tensor]:
    """Returns the weights in the newest complete checkpoint of a run, by parameter name.

    Raises:
        ValueError: if the run has none.
    """
    checkpoint = CheckpointDir(run / "checkpoints").latest()
    if checkpoint is None:
        raise ValueError(f"{run} has no complete checkpoint yet")
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
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / WEIGHTS, {"format": "pt"})
    encoder.tokenizer.save_pretrained(out)
    (out / CONFIG).write_text(yaml.safe_dump({key: config[key] for key in MODEL_KEYS}, sort_keys=False))
    index = {"model_type": "eagle_train", "parameters": sum(t.numel() for t in weights.values())}
    (out / "config.json").write_text(json.dumps(index, indent=1))
    written = load_file(out / WEIGHTS)
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items()), "export differs"
    return out
