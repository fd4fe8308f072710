"""Released checkpoints of any family: how they enter a folder of this package, and what it keeps for the way back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eagle_train.model.checkpoints.files import read_weights, stray_files, write_weights
from eagle_train.model.checkpoints.names import Match
from eagle_train.train.load import CARRIED, check_empty, write_export

CONFIG, GENERATION, PREPROCESSOR = "config.json", "generation_config.json", "preprocessor_config.json"
KEPT = (CONFIG, GENERATION, PREPROCESSOR, "processor_config.json", "*.py")
"""Files of a release, besides weights and tokenizer, that an import keeps: configs and the code that they name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What became of a released checkpoint."""

    towers: tuple[str, ...]
    """Names of the encoders, in order."""
    match: Match
    strays: list[str]
    """Files of weights that are not part of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """What an import keeps of a release for the way back."""

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Those that the model has no use for, by released name."""
    folder: Path | None = None

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns a JSON file of the release; nothing if it had none."""
        path = self.folder / name if self.folder else None
        return json.loads(path.read_text()) if path and path.is_file() else {}


def read_original(folder: Path) -> dict[str, Any]:
    """Returns the `config.json` of a released checkpoint.

    Raises:
        ValueError: if there is none.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no released checkpoint: it has no {CONFIG}")
    return json.loads((folder / CONFIG).read_text())


def write_import(
    folder: Path,
    out: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    found: Match,
    towers: tuple[str, ...],
) -> Imported:
    """Writes an export of a released checkpoint to `out`; tensors go from mapped file to file, never all in memory.

    Raises:
        ValueError: if `out` is not empty, or the checkpoint does not fit the model, with every reason.
    """
    check_empty(out)
    found.demand()
    write_export(out, config, {name: weights[key] for key, name in found.names.items()})
    # Copies: tables that torch files keep once for many names may not share memory in safetensors.
    write_weights(out / CARRIED, {key: weights[key].clone() for key in found.unused})
    for path in sorted(path for pattern in KEPT for path in folder.glob(pattern)):
        shutil.copy(path, out / CARRIED / path.name)
    return Imported(towers=towers, match=found, strays=stray_files(folder))


def read_carried(path: Path, config: Mapping[str, Any]) -> Carried:
    """Returns what is kept of the release that a model, or the one that it began with, was imported from."""
    for source in (path, config.get("init_from")):
        if source is not None and (folder := Path(source) / CARRIED).is_dir():
            return Carried(weights=read_weights(folder), folder=folder)
    return Carried()


def copy_code(carried: Carried, out: Path) -> None:
    """Copies the code of a release that its configs name to an export of it."""
    for path in sorted(carried.folder.glob("*.py")) if carried.folder else ():
        shutil.copy(path, out / path.name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as transformers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
