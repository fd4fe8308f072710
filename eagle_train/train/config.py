"""Hydra's home: overrides become one composed config, a config node becomes an object.

Everything outside this file sees plain dicts and constructor arguments.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eagle_train.resources import resource_dir

OF_STAGES = (("", "chat_template"), ("data.", "tiling"), ("", "degrade"))
"""Where the run has what a stage may have of its own, and its name."""


class ConfigError(ValueError):
    """The overrides do not make a config; the message names the nearest valid key or choice."""


def load_config(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the composed and resolved config.

    Raises:
        ConfigError: for an unknown key, experiment or group option, or a missing value.
    """
    with initialize_config_dir(str(resource_dir("configs").resolve()), version_base="1.3"):
        try:
            config = compose("train", overrides=list(overrides))
            if missing := sorted(OmegaConf.missing_keys(config)):
                raise ConfigError(
                    f"no value for {', '.join(missing)}; choose an experiment with "
                    f"+experiment=NAME (known: {', '.join(options('experiment'))}) or set them"
                )
            if unknown := sorted(set(config) - root_keys()):
                raise ConfigError(f"no config key {unknown[0]!r}{nearest(unknown[0], sorted(root_keys()))}")
            return OmegaConf.to_container(config, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(str(error), overrides)) from error


def load_choice(group: str, name: str) -> dict[str, Any]:
    """Returns one choice of a config group by itself, resolved.

    Raises:
        ConfigError: for an unknown one, with the nearest.
    """
    known = options(group)
    if name not in known:
        raise ConfigError(f"no {group} {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    with initialize_config_dir(str(resource_dir("configs").resolve()), version_base="1.3"):
        return OmegaConf.to_container(compose(f"{group}/{name}")[group], resolve=True)


def root_keys() -> set[str]:
    """Returns the top-level keys that a config may have: those of `train.yaml` and its groups."""
    root = yaml.safe_load((resource_dir("configs") / "train.yaml").read_text())
    groups = (name for entry in root.pop("defaults") if isinstance(entry, dict) for name in entry)
    return {*root, *groups}


def to_yaml(config: dict[str, Any]) -> str:
    """Returns a config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config))


def build(node: Any, **arguments: Any) -> Any:
    """Returns what a config node describes: nested `_target_` mappings become objects.

    Raises:
        ConfigError: if a constructor refuses its arguments, with its reason.
    """
    try:
        return instantiate(node, _convert_="all", **arguments)
    except HydraException as error:
        raise ConfigError(f"{node.get('_target_')}: {error.__cause__ or error}") from error


def constructor(node: dict[str, Any]) -> Any:
    """Returns the class or function a config node names."""
    return get_object(node["_target_"])


def options(group: str) -> list[str]:
    """Returns the choices of a config group."""
    return sorted(path.stem for path in (resource_dir("configs") / group).glob("*.yaml"))


def explain(message: str, overrides: Sequence[str]) -> str:
    """Returns what is wrong with the overrides and the nearest thing that would be right."""
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            return f"{override!r} is no override; write key=value"
        key, _, value = override.lstrip("+~").partition("=")
        group = key.split("@")[0]
        known = options(group)
        if known and value not in known:
            return f"no {group} {value!r}{nearest(value, known)} (known: {', '.join(known)})"
    if message.startswith("You must specify"):
        return f"choose an experiment with +experiment=NAME (known: {', '.join(options('experiment'))})"
    if message.startswith("Multiple values for"):  # of `+lora=qwen`
        return f"{in_one_line(message)}; on the command line write it without the +"
    try:
        valid = valid_keys(overrides)
    except (HydraException, OmegaConfBaseException) as error:  # a group that is not at that place of the config
        return in_one_line(str(error))
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if "@" not in key and key not in valid and not options(key):
            near = nearest(key, [name for name in valid if not name.rpartition(".")[2].startswith("_")])
            nested = "." in key and not override.startswith(("+", "~"))
            add = "; an argument that it leaves out is given as +key=value" if nested else ""
            return f"no config key {key!r}{near} (`--cfg` prints the composed config{add})"
    return in_one_line(message)


def in_one_line(message: str) -> str:
    """Returns all lines of a message of Hydra or OmegaConf as one, remedies too, less the types of the nodes."""
    lines = (line.strip() for line in message.splitlines())
    return " ".join(line for line in lines if line and not line.startswith(("object_type=", "reference_type=")))


def without_effect(overrides: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Returns the overrides of a run's template, tiling or degrading that no stage follows: each has its own.

    Args:
        config: what they compose.
    """
    stages = config["schedule"].values()
    own = {f"{group}{name}": name for group, name in OF_STAGES if all(stage.get(name) for stage in stages)}
    keys = {override: override.lstrip("+~").partition("=")[0] for override in overrides}
    return [override for override, key in keys.items() if any(key == o or key.startswith(f"{o}.") for o in own)]


def nearest(word: str, known: Sequence[str]) -> str:
    """Returns `; did you mean X?` for the closest of `known`, or nothing."""
    close = difflib.get_close_matches(word, known, 1, 0.5)
    # A key may be given without the groups it stands in: compare the last parts too.
    if not close:
        last = {name.rpartition(".")[2]: name for name in known}
        close = [last[name] for name in difflib.get_close_matches(word.rpartition(".")[2], list(last), 1)]
    return f"; did you mean {close[0]!r}?" if close else ""


def valid_keys(overrides: Sequence[str]) -> list[str]:
    """Returns the dotted keys of the config that the group choices among the overrides compose."""
    chosen = [o for o in overrides if options(o.lstrip("+~").partition("=")[0].split("@")[0])]
    config = OmegaConf.to_container(compose("train", overrides=chosen), resolve=False)
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for name, child in node.items():
            keys.append(f"{prefix}{name}")
            if isinstance(child, dict):
                walk(child, f"{prefix}{name}.")

    walk(config, "")
    return keys
