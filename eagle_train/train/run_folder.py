"""The records of a run's starts: `config.yaml` and `attempts.jsonl` in its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from eagle_train import dist
from eagle_train.track.jsonl import read_metrics

ATTEMPTS = "attempts.jsonl"


def record_attempt(folder: Path, config: str, run_id: str, resumed_from: Path | None) -> int:
    """Writes the config, as YAML, and a line about this start of the run; returns its number, from 0.

    A line that a kill tore is cut off first: that start had not begun.

    Raises:
        ValueError: if an earlier line is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "config.yaml", config)
    attempt = len(read_attempts(folder))
    line = {
        "attempt": attempt,
        "time": time.time(),
        "run_id": run_id,
        "ranks": dist.world_size(),
        "resumed_from": resumed_from and resumed_from.name,
    }
    with (folder / ATTEMPTS).open("a+b") as file:
        file.seek(0)
        file.truncate(sum(map(len, file.readlines()[:attempt])))
        file.write(json.dumps(line).encode() + b"\n")
    return attempt


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole: a kill or a full disk leaves what was there before."""
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text)
    aside.replace(path)


def first_run_id(folder: Path) -> str | None:
    """Returns the tracker's run id of the first start; a run killed before its first checkpoint keeps it."""
    attempts = read_attempts(folder)
    return attempts[0]["run_id"] if attempts else None


def read_attempts(folder: Path) -> list[dict]:
    """Returns the records of the starts so far; a last line torn by a kill is left out.

    Raises:
        ValueError: if another line is damaged.
    """
    path = folder / ATTEMPTS
    return read_metrics(path) if path.exists() else []


def changed_keys(saved: Path, config: Mapping[str, Any]) -> list[str]:
    """Returns the dotted keys in which a saved config and this one differ."""
    before, after = flat(yaml.safe_load(saved.read_text())), flat(config)
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 8) -> list[str]:
    """Returns what differs between two nested mappings of plain values, as `dotted.key: before -> now`."""
    old, new = flat(json.loads(json.dumps(before, default=str))), flat(json.loads(json.dumps(now, default=str)))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    shown = [f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in changed[:most]]
    return shown + ([f"and {len(changed) - most} more"] if len(changed) > most else [])


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings by dotted key."""
    leaves: dict[str, Any] = {}
    for name, child in node.items():
        leaves |= flat(child, f"{prefix}{name}.") if isinstance(child, Mapping) else {f"{prefix}{name}": child}
    return leaves
