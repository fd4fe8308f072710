"""Whether a config's encoders, mixture and rows fit together; if not, every reason and the nearest that would."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from eagle_train.model.geometry import GeometryError
from eagle_train.model.mixtures.base import Mixture
from eagle_train.train.config import ConfigError, build

MAX_ROUNDS = 8
"""Repairs of repairs before giving up; a mixture needs one round for its encoders, one for itself, one for rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that makes a config impossible.

    Args:
        reason: for the reader.
        repair: values by config key that would do, the nearest ones; empty if no other size would help.
    """

    reason: str
    repair: Mapping[str, Any] = field(default_factory=dict)


def check_geometry(config: Mapping[str, Any]) -> Mixture:
    """Returns the mixture of a config, on the meta device; an image of it fits into a row of every stage.

    Faults that only show when others are repaired (a mixture's when its encoders are, its rows' when it is) are
    found on the nearest repaired config, so that all are told at once and what is proposed is possible.

    Args:
        config: composed; one without `schedule`, as an export has it, has no rows to fit into.

    Raises:
        ConfigError: with every reason, and the overrides that make the nearest possible config.
    """
    reasons: list[str] = []
    repair: dict[str, Any] = {}
    trial = config
    for _ in range(MAX_ROUNDS):
        mixture, faults = try_mixture(trial)
        reasons += [fault.reason for fault in faults]
        if not all(fault.repair for fault in faults):
            break
        if not faults:
            if not reasons:
                return mixture
            overrides = " ".join(override(config, key, value) for key, value in repair.items())
            raise ConfigError(explain(reasons, f"the nearest that is possible: {overrides}"))
        for fault in faults:
            repair |= fault.repair
        trial = with_values(config, repair)
    raise ConfigError(explain(reasons, "other sizes alone do not repair it"))


def try_mixture(config: Mapping[str, Any]) -> tuple[Mixture | None, list[Fault]]:
    """Returns the mixture, and the faults of its rows; None, and those of its encoders or its own, if it has any."""
    with torch.device("meta"):
        try:
            mixture = build(config["mixture"])
        except ConfigError as error:
            faults = list(encoder_faults(config["mixture"]["encoders"]))
            return None, faults or [fault_of(error, "mixture")]
    return mixture, list(row_faults(config, mixture))


def encoder_faults(nodes: Mapping[str, Any]) -> Iterator[Fault]:
    """Yields a fault for every encoder that cannot be built."""
    for name, node in nodes.items():
        try:
            build(node)
        except ConfigError as error:
            yield fault_of(error, f"mixture.encoders.{name}")


def fault_of(error: ConfigError, key: str) -> Fault:
    """Returns the fault that an error of the config node at `key` tells of."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, GeometryError):
        cause = cause.__cause__
    if cause is None:
        return Fault(reason=f"{key}: {error}")
    return Fault(reason=f"{key}: {cause}", repair={f"{key}.{cause.argument}": cause.nearest[0]})


def row_faults(config: Mapping[str, Any], mixture: Mixture) -> Iterator[Fault]:
    """Yields a fault for every stage whose rows have no room for an image and a token of text."""
    lengths = {name: stage["max_length"] for name, stage in config.get("schedule", {}).items()}
    for name, length in lengths.items():
        if mixture.tokens_per_tile >= length:
            arguments = mixture.arguments_within(min(lengths.values()) - 1)
            yield Fault(
                reason=f"schedule.{name}: an image takes {mixture.tokens_per_tile} tokens, a row has {length}; raise "
                f"schedule.{name}.max_length or make fewer tokens",
                repair={f"mixture.{argument}": value for argument, value in arguments.items()},
            )


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with other values at some dotted keys."""
    changed = dict(config)
    for key, value in values.items():
        first, _, rest = key.partition(".")
        changed[first] = with_values(changed.get(first) or {}, {rest: value}) if rest else value
    return changed


def override(config: Mapping[str, Any], key: str, value: Any) -> str:
    """Returns the override that gives `value` to `key`, quoted for a shell.

    It has a plus sign where the config does not have the key.
    """
    node: Any = config
    for part in key.split("."):
        known = isinstance(node, Mapping) and part in node
        node = node[part] if known else None
    if isinstance(value, Mapping):
        value = "{" + ",".join(f"{name}:{entry}" for name, entry in value.items()) + "}"
    return shlex.quote(f"{'' if known else '+'}{key}={value}")


def explain(reasons: list[str], remedy: str) -> str:
    """Returns the message: every reason once, and what to do."""
    lines = "\n".join(f"  - {reason}" for reason in dict.fromkeys(reasons))
    return f"this mixture is impossible:\n{lines}\n  {remedy}"
