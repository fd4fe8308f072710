"""Where the project's YAML files and batch script are: beside the package in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def resource_dir(name: str) -> Path:
    """Returns the folder `configs`, `data_recipes` or `slurm`."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name
