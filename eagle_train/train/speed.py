"""How fast a run is for its hardware: the FLOPs of its rows, the peak of its devices, and what MFU means here."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eagle_train import dist
from eagle_train.model.pass_flops import CONVENTION, StepFlops, step_flops
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.peak import peak_tflops
from eagle_train.track.throughput import Throughput
from eagle_train.train.assemble import adapters, stage_model
from eagle_train.train.optim import freeze
from eagle_train.train.run_folder import replace_text
from eagle_train.train.schedule import Stage

log = logging.getLogger(__name__)

FILE = "speed.json"


def speedometer(
    config: Mapping[str, Any], meta: VisionLanguageModel, name: str, stage: Stage
) -> tuple[StepFlops, Throughput]:
    """Returns the FLOPs of a stage's rows and the meter of its speed; rank 0 says and writes down what they mean.

    Args:
        meta: see `stage_flops`.
        name: of the stage.
    """
    flops, peak = stage_flops(config, meta, stage), peak_of(config)
    if dist.rank() == 0:
        log.warning(write_speed(Path(config["run_dir"]), name, flops, peak))
    return flops, Throughput(num_ranks=dist.world_size(), peak_tflops=peak)


def stage_flops(config: Mapping[str, Any], meta: VisionLanguageModel, stage: Stage) -> StepFlops:
    """Returns the FLOPs of a stage's rows, as it trains them; rank 0 counts them for all.

    Args:
        meta: the run's model on the meta device, with its adapters; what is frozen in it becomes that of the stage.
    """
    if dist.rank() != 0:
        return dist.broadcast_object(None)
    with torch.device("meta"):
        model = stage_model(config, meta, stage)
    freeze(model, stage.learning_rates, adapters(config))
    recomputed = bool(config["engine"].get("activation_checkpointing"))
    return dist.broadcast_object(step_flops(model, config["data"]["tile_size"], recomputed=recomputed))


def device_name() -> str:
    """Returns the name of this rank's device."""
    device = dist.device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_of(config: Mapping[str, Any]) -> float | None:
    """Returns the peak of this rank's device, 1e12 FLOP/s: the config's, or the one known by its name, or None."""
    return peak_tflops(device_name()) if config["peak_tflops"] is None else float(config["peak_tflops"])


def write_speed(folder: Path, stage: str, flops: StepFlops, peak: float | None) -> str:
    """Writes what the numbers of a stage's speed are made of to `speed.json`; returns it in one line.

    Args:
        peak: see `peak_of`.
    """
    path = folder / FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    stages = known.get("flops", {}) | {stage: asdict(flops)}
    facts = {"device": device_name(), "peak_tflops": peak, "ranks": dist.world_size(), "convention": CONVENTION}
    replace_text(path, json.dumps(facts | {"flops": stages}, indent=1))
    shown = f"{peak:g} TFLOP/s" if peak else "not known, so there is no MFU; set peak_tflops"
    convention = f"What is counted is in {path}." if known.get("flops") else CONVENTION
    return f"peak of {facts['device']}: {shown}. {convention}"
