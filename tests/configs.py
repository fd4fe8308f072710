"""Composed configs and models that were never trained, for tests that only look at them."""

from __future__ import annotations

import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from eagle_train.model.checkpoints.files import write_weights
from eagle_train.train.assemble import build_model
from eagle_train.train.config import load_config, to_yaml
from tests.runs import overrides


def composed(*changes: str) -> dict[str, Any]:
    """Returns a config of one's own; equal overrides are composed once, as that takes Hydra a quarter of a second."""
    return deepcopy(_composed(changes))


@cache
def _composed(changes: tuple[str, ...]) -> dict[str, Any]:
    return load_config(changes)


def untrained(data: Path, folder: Path) -> Path:
    """Writes an export of the small toy model as it is before its first step; returns its folder."""
    config = load_config(overrides(data, folder))
    write_weights(folder, build_model(config).state_dict())
    (folder / "config.yaml").write_text(to_yaml(config))
    shutil.copytree(data / "tokenizer", folder, dirs_exist_ok=True)
    return folder
