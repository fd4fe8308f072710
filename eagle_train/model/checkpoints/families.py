"""Which published layout a checkpoint has: told by its `config.json`, or by the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from eagle_train.model.checkpoints import eagle2_config, internvl_config, qwen2_vl_config
from eagle_train.model.checkpoints.files import listed

EAGLE1, EAGLE2, INTERNVL, QWEN2_VL = "eagle1", "eagle2", "internvl", "qwen2_vl"
PREFIXES = {
    EAGLE1: (
        "model.vision_tower.",
        "model.mm_projector.",
        "model.embed_tokens.",
        "model.layers.",
        "model.norm.",
        "lm_head.",
    ),
    EAGLE2: ("vision_model.", "mlp1.", "language_model."),
    QWEN2_VL: ("visual.", "model."),
}
"""How the names of every tensor of a family begin; those of a checkpoint begin in each of these ways."""


def detect(config: Mapping[str, Any], keys: Collection[str]) -> str:
    """Returns the family of a released checkpoint.

    Args:
        config: its `config.json`.
        keys: names of its tensors; they count where the config does not tell.

    Raises:
        ValueError: for a checkpoint of no known family, naming the nearest and what differs.
    """
    if "mm_vision_tower" in config:
        return EAGLE1
    if config.get("model_type") in eagle2_config.MODEL_TYPES:
        return EAGLE2
    if config.get("model_type") in internvl_config.MODEL_TYPES:
        return INTERNVL
    if config.get("model_type") == qwen2_vl_config.MODEL_TYPE:
        return QWEN2_VL
    complete = [family for family in PREFIXES if not missing(family, keys) and not unexpected(family, keys)]
    if complete:
        return complete[0]
    nearest = min(PREFIXES, key=lambda family: len(missing(family, keys)) / len(PREFIXES[family]))
    gaps = {"it has no": [f"{p}*" for p in missing(nearest, keys)], "it does not know": unexpected(nearest, keys)}
    told = "; ".join(f"{what} {listed(names)}" for what, names in gaps.items() if names)
    raise ValueError(
        f"model_type {config.get('model_type')!r} is of no known layout; the nearest is that of {nearest}: {told}"
    )


def missing(family: str, keys: Collection[str]) -> list[str]:
    """Returns the prefixes of a family that no tensor has."""
    return [prefix for prefix in PREFIXES[family] if not any(key.startswith(prefix) for key in keys)]


def unexpected(family: str, keys: Collection[str]) -> list[str]:
    """Returns the tensors that begin otherwise than a family's, the first of each kind."""
    others = sorted(key for key in keys if not key.startswith(PREFIXES[family]))
    return list({key.split(".")[0]: key for key in reversed(others)}.values())[::-1]
