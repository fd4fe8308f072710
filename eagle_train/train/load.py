"""A trained model for use: from the newest checkpoint of a run, or from an export."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from eagle_train import dist
from eagle_train.data.encode import Encoder
from eagle_train.data.tokenizer.added import write_tokenizer
from eagle_train.model.checkpoints.files import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    SHARD_BYTES,
    listed,
    read_weights,
    shape_of,
    write_weights,
)
from eagle_train.model.lora import MergedWeights, write_adapter
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import adapters, build_encoder, build_model, meta_model
from eagle_train.train.checkpoint import CheckpointDir, step_of
from eagle_train.train.logits_check import check_logits, fits_memory
from eagle_train.train.manifest import problem_of_ranks
from eagle_train.train.pieces import CheckpointWeights, PieceReader
from eagle_train.train.placement import Construction, WholeWeights

CONFIG = "config.yaml"
CARRIED = "released"
"""Folder in an import with what the model has no use for: unused tensors and the original `config.json`."""
MODEL_KEYS = ("name", "new_tokens", "mixture", "projector", "llm", "chat_template", "data", "degrade", "loss")

OLDER_DATA = {
    "videos": {"_target_": "eagle_train.data.video_frames.PyAvVideo"},
    "positions": {"_target_": "hydra.utils.get_method", "path": "eagle_train.data.positions.sequential"},
}
"""What configs written before there was a choice meant, by keys of their `data`."""


def load_model(path: Path) -> tuple[VisionLanguageModel, Encoder]:
    """Returns the model, on this process's device in evaluation mode, and the encoder of samples.

    Args:
        path: a run folder (its newest complete checkpoint counts) or an export.

    Raises:
        ValueError: if it is neither.
    """
    config = read_config(path)
    construction = Construction(partial(build_model, config), WholeWeights(dist.device(), torch.float32))
    load_weights(construction.model, read_model_weights(path), put=construction.put)
    model = construction.finish()
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    return model.eval(), encoder


Put = Callable[[torch.Tensor, torch.Tensor], None]
"""Gives a parameter or buffer of a model (first) a value (second) of its shape."""


@torch.no_grad()
def copy(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a value into a parameter or buffer where it lies."""
    tensor.copy_(value)


def load_weights(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    fresh: tuple[str, ...] = (),
    *,
    put: Put = copy,
    reads: bool = True,
) -> list[str]:
    """Puts weights into a module by name, one after another; of tied ones, one name is enough.

    Args:
        fresh: prefixes of names that `weights` need not have.
        put: see `Put`; that of a `Construction` for a module that is not finished.
        reads: if false, `put` makes no use of the values of parameters, which are not read then.

    Returns:
        The names that `weights` did not have.

    Raises:
        ValueError: for weights that are missing, misshapen, or that the module does not have.
    """
    own = module.state_dict(keep_vars=True)
    given = {id(own[name]) for name in weights if name in own}
    absent = [name for name, tensor in own.items() if id(tensor) not in given]
    faults = {
        "missing": [name for name in absent if not name.startswith(fresh)],
        "unexpected": [name for name in weights if name not in own],
        "misshapen": [
            f"{name} {tuple(shape_of(weights, name))} instead of {tuple(own[name].shape)}"
            for name in weights
            if name in own and shape_of(weights, name) != own[name].shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"the weights do not fit the model: {found}")
    for name in weights:
        unread = not reads and isinstance(own[name], nn.Parameter)
        put(own[name], torch.zeros(()).expand(own[name].shape) if unread else weights[name])
    return absent


def is_export(path: Path) -> bool:
    """Returns whether `path` is a folder that `export` or `import` wrote."""
    weights = (path / SAFETENSORS, path / SAFETENSORS_INDEX)
    return (path / CONFIG).is_file() and any(file.is_file() for file in weights)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the config of an export, whose tokenizer lies in it, or of a run's newest checkpoint.

    Raises:
        ValueError: if there is none, or it is of an earlier version.
    """
    if is_export(path):
        return parse_config(path / CONFIG) | {"tokenizer": str(path)}
    return parse_config(newest_checkpoint(path) / CONFIG)


def parse_config(path: Path) -> dict[str, Any]:
    """Returns the config in a file of a run or export.

    Raises:
        ValueError: if it lacks what this version needs.
    """
    config = yaml.safe_load(path.read_text())
    if missing := [key for key in MODEL_KEYS if key not in config]:
        raise ValueError(
            f"{path} was written by an earlier version: it has no {', '.join(missing)}; edit it as the changelog says, "
            f"or use the version that wrote it"
        )
    return config | {"data": OLDER_DATA | config["data"]}


def read_model_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """Returns the weights of an export, or of a run's newest checkpoint, by parameter name; adapters are merged.

    They are mapped into memory, or read when asked for, so that a model that takes them is not there twice.
    """
    if is_export(path):
        return read_weights(path)
    weights = without_aligner(read_checkpoint_weights(newest_checkpoint(path)))
    return MergedWeights(weights, adapters(read_config(path)))


def read_checkpoint_weights(checkpoint: Path) -> CheckpointWeights:
    """Returns the weights of a checkpoint by parameter name, as the model computed with them."""
    return CheckpointWeights(PieceReader(checkpoint))


def without_aligner(weights: CheckpointWeights) -> CheckpointWeights:
    """Returns the weights of a model: the aligner of a stage of pre-alignment is no part of it."""
    return weights.only(name for name in weights if not name.startswith("aligner."))


def newest_checkpoint(run: Path, *, step: int | None = None, thorough: bool = False) -> Path:
    """Returns the newest complete checkpoint of a run.

    Args:
        step: the checkpoint of this global step instead.
        thorough: read every byte of it and compare the hashes; otherwise only sizes.

    Raises:
        ValueError: if it has none, or is no run.
    """
    if not (run / CONFIG).is_file():
        released = "; `import` reads released checkpoints" if (run / "config.json").is_file() else ""
        raise ValueError(f"{run} is neither a run nor an export: it has no {CONFIG}{released}")
    checkpoints = CheckpointDir(run / "checkpoints")
    if step is None:
        checkpoint = checkpoints.latest(thorough=thorough)
        if checkpoint is None:
            raise ValueError(f"{run} has no complete checkpoint yet")
        return checkpoint
    checkpoint = checkpoints.path(step)
    if not checkpoint.is_dir():
        there = ", ".join(str(step_of(path)) for path in checkpoints.published()) or "none"
        raise ValueError(f"{run} has no checkpoint of step {step}; there are those of steps {there}")
    if trouble := problem_of_ranks(checkpoint, thorough=thorough):
        raise ValueError(f"{checkpoint} is no whole checkpoint: {trouble}")
    return checkpoint


def export_run(
    run: Path, out: Path, *, step: int | None = None, check: bool | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes weights, config and tokenizer of a checkpoint of a run to `out`, in place of an earlier export.

    The folder is all that `load_model` needs: it may be moved, the run deleted. No more than one file of weights is
    in memory at a time, whatever engine and number of ranks wrote the checkpoint.

    Args:
        run: a run folder, or an export, which is copied.
        step: global step of the checkpoint; None: the newest.
        check: compare the logits of a sample, from the checkpoint and from what was written, which takes as much memory
            as the model; None: where there is room.
        shard_bytes: of a file of weights, at most.

    Raises:
        ValueError: if the weights do not fit the config's model, the written ones give other logits, or `out` holds
            something else: an imported release is never replaced.
    """
    if is_export(run):
        config, weights = read_config(run), read_weights(run)
    else:
        checkpoint = newest_checkpoint(run, step=step, thorough=True)
        config = parse_config(checkpoint / CONFIG)
        weights = MergedWeights(without_aligner(read_checkpoint_weights(checkpoint)), adapters(config))
    meta = meta_model(config)
    weights = untied(weights, meta, run)
    replaces = is_export(out) and not (out / CARRIED).exists() and out.resolve() != run.resolve()
    if not replaces:
        check_empty(out)
    aside = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    write_export(aside, config, weights, shard_bytes)
    if fits_memory(meta) if check is None else check:
        written = read_config(aside)
        model = build_model(written).eval()
        encoder = build_encoder(written, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
        check_logits(model, encoder, weights, read_weights(aside), aside)
    if out.exists():
        shutil.rmtree(out)
    aside.replace(out)
    return out


def export_adapter(run: Path, out: Path, *, step: int | None = None) -> Path:
    """Writes the LLM's adapters of a checkpoint of a run as peft has them, to be put on the LLM alone.

    Args:
        step: global step of the checkpoint; None: the newest.

    Raises:
        ValueError: if the LLM has none, or `out` is not empty.
    """
    config = read_config(run)
    if "llm" not in (found := adapters(config)):
        raise ValueError(f"{run} has no adapters of its LLM; its lora has {sorted(found)}")
    check_empty(out)
    weights = read_checkpoint_weights(newest_checkpoint(run, step=step, thorough=True))
    base = None if config.get("init_from") else config["llm"].get("pretrained")  # no LLM alone has those of `init_from`
    write_adapter(out, "llm", found["llm"], weights, base)
    return out


def untied(weights: Mapping[str, torch.Tensor], meta: nn.Module, run: Path) -> Mapping[str, torch.Tensor]:
    """Returns the weights that a model needs, tied ones once.

    Args:
        meta: the model, on the meta device.
        run: where they are from, for the message.

    Raises:
        ValueError: if they do not fit the model.
    """
    own = meta.state_dict(keep_vars=True)
    first_of = {id(tensor): name for name, tensor in reversed(own.items())}
    expected = {name: tensor.shape for name, tensor in own.items() if first_of[id(tensor)] == name}
    found = {name: shape_of(weights, name) for name in weights if name in expected or name not in own}
    if differing := sorted(set(expected.items()) ^ set(found.items())):
        raise ValueError(f"the weights of {run} do not fit its config: {differing[:4]}")
    return {name: weights[name] for name in expected} if isinstance(weights, dict) else weights.only(expected)


def write_export(
    out: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a folder that `load_model` reads.

    Args:
        shard_bytes: of a file of weights, at most; so much is in memory at a time.

    Raises:
        ValueError: if `out` is not empty.
    """
    check_empty(out)
    write_weights(out, weights, shard_bytes)
    write_tokenizer(config["tokenizer"], config["new_tokens"], out)
    (out / CONFIG).write_text(yaml.safe_dump({key: config[key] for key in MODEL_KEYS}, sort_keys=False))


def check_empty(out: Path) -> None:
    """Raises ValueError if `out` holds anything."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; delete it or choose another folder")
