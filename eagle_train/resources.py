"""Where the project's own YAML files are: beside the package in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def resource_dir(name: str) -> Path:
    """Returns the folder `configs` or `data_recipes`."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name
