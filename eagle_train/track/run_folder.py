"""What a run left in its folder, as the report reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eagle_train.track.jsonl import read_metrics
from eagle_train.track.timeline import Timeline, read_timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """The records of a run; each is empty where the run has not written it yet."""

    path: Path
    records: list[dict[str, Any]]
    """Of `metrics.jsonl`, in order of their step."""
    config_text: str
    """Of `config.yaml`."""
    config: Mapping[str, Any]
    mixture: Mapping[str, Mapping[str, Mapping[str, float]]]
    """stage -> source -> `asked` and `realized` share."""
    accounting: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """stage -> source -> `read`, `used`, `dropped` (reason -> count), `shortened`, and sums of the used."""
    gallery: list[dict[str, Any]]
    """Held-out questions with answers."""
    attempts: list[dict[str, Any]]
    """One per start of the run."""
    timeline: Timeline
    """Where the time of all starts went."""
    speed: Mapping[str, Any]
    """Of `speed.json`: the device, its peak, and what MFU counts."""

    @property
    def name(self) -> str:
        """The experiment's name, or the folder's."""
        return str(self.config.get("name") or self.path.resolve().name)

    @property
    def training(self) -> list[dict[str, Any]]:
        """The records of training steps."""
        return [record for record in self.records if "train/loss" in record]

    @property
    def scores(self) -> dict[str, float]:
        """The newest value of every `eval*` metric, those that are numbers."""
        found: dict[str, float] = {}
        for record in self.records:
            found |= {name: v for name, v in record.items() if name.startswith("eval") and v is not None}
        return found


def read_run(path: Path) -> RunFolder:
    """Returns the records of a run folder.

    Raises:
        ValueError: if the folder holds none of them, or one is damaged.
    """
    names = ("metrics.jsonl", "config.yaml", "mixture.json", "accounting.json", "gallery/gallery.json")
    if not any((path / name).is_file() for name in names):
        raise ValueError(f"{path} is not the folder of a run: it holds none of {', '.join(names)}; give its run_dir")
    metrics, attempts, config = path / "metrics.jsonl", path / "attempts.jsonl", path / "config.yaml"
    config_text = config.read_text(encoding="utf-8") if config.exists() else ""
    return RunFolder(
        path=path,
        records=read_metrics(metrics) if metrics.exists() else [],
        config_text=config_text,
        config=yaml.safe_load(config_text) or {},
        mixture=_read_json(path / "mixture.json", {}),
        accounting=_read_json(path / "accounting.json", {}),
        gallery=_read_json(path / "gallery" / "gallery.json", []),
        attempts=read_metrics(attempts) if attempts.exists() else [],
        timeline=read_timeline(path / "goodput.jsonl") if (path / "goodput.jsonl").exists() else Timeline(),
        speed=_read_json(path / "speed.json", {}),
    )


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); if the run is writing it, try again") from error
