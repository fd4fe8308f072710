"""A whole run: the stages of the schedule one after another, resumable at any step, and the evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from eagle_train import dist
from eagle_train.data.loader import RowDataset
from eagle_train.data.recipe import card_source, load_recipe
from eagle_train.data.too_long import DropTooLong
from eagle_train.model.describe import describe
from eagle_train.track.console import ConsoleTracker
from eagle_train.track.jsonl import JsonlTracker, read_metrics
from eagle_train.track.tracker import Trackers
from eagle_train.track.wandb_tracker import new_run_id
from eagle_train.train.assemble import (
    add_adapters,
    build_encoder,
    build_model,
    build_placement,
    build_schedule,
    check_stages,
    meta_model,
)
from eagle_train.train.checkpoint import (
    CheckpointDir,
    TrainState,
    hash_of,
    read_state,
    seed_everything,
)
from eagle_train.train.config import ConfigError, build, to_yaml
from eagle_train.train.costs import forward_flops
from eagle_train.train.evaluate import evaluate
from eagle_train.train.placement import Construction
from eagle_train.train.preemption import PreemptionFlag
from eagle_train.train.pretrained import load_run_start, start_table
from eagle_train.train.run_folder import changed_keys, first_run_id, record_attempt
from eagle_train.train.stage_data import make_layout, read_sources
from eagle_train.train.stage_run import Run, run_stage

log = logging.getLogger(__name__)


def train(config: Mapping[str, Any]) -> bool:
    """Runs or resumes the run a config describes; returns whether it is complete (False: preempted).

    Everything of the run is under `run_dir`; the same config resumes from its newest complete checkpoint.
    """
    dist.init()
    run = start(config)
    try:
        for name, stage in run.schedule.items():
            if list(run.schedule).index(name) < list(run.schedule).index(run.state.stage):
                continue
            if run.state.stage != name:
                run.state = replace(run.state, stage=name, step=0, plan="", cursor={}, read={})
            if not run_stage(run, stage):
                log.warning("preempted at step %d; state saved, run the same command to go on", run.state.global_step)
                dist.shutdown()
                return False
        run.preempted.close()  # a signal now ends the process at once: there is nothing left to save
        finish(run)
    finally:
        run.preempted.close()
        run.trackers.close()
    dist.shutdown()
    return True


def start(config: Mapping[str, Any]) -> Run:
    """Returns a run ready for its first or next stage."""
    folder = Path(config["run_dir"])
    schedule = build_schedule(config)
    meta = meta_model(config)
    add_adapters(config, meta)
    check_stages(config, meta, schedule)
    checkpoints = CheckpointDir(folder / "checkpoints", config["keep_last"])
    seed_everything(config["seed"])
    placement = build_placement(config["engine"])
    construction = Construction(partial(build_model, config), placement)
    model = construction.model
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    latest = checkpoints.latest()
    if latest is None:
        run_id = dist.broadcast_object(first_run_id(folder) or new_run_id())
        state = TrainState(stage=next(iter(schedule)), run_id=run_id)
        starts = load_run_start(config, model, encoder.tokenizer, put=construction.put)
        if dist.rank() == 0:
            Console(stderr=True).print(start_table(starts))
    else:
        state = read_state(latest)
        log.warning("resuming stage %s at step %d from %s", state.stage, state.step, latest)
        if state.stage not in schedule:
            raise ConfigError(f"{latest} is in stage {state.stage!r}; the schedule has {sorted(schedule)}")
        if state.config_hash != hash_of(to_yaml(config)):
            log.warning("the config changed: %s", ", ".join(changed_keys(latest / "config.yaml", config)))
    add_adapters(config, model)
    construction.finish(initial=latest is None)
    state.config_hash = hash_of(to_yaml(config))
    attempt = record_attempt(folder, config, state.run_id, latest) if dist.rank() == 0 else None
    attempt = dist.broadcast_object(attempt)
    return Run(
        config=config,
        folder=folder,
        model=model,
        meta=meta,
        placement=placement,
        flops=forward_flops(meta, describe(meta.mixture, config["data"]["tile_size"])),
        encoder=encoder,
        schedule=schedule,
        checkpoints=checkpoints,
        resume_from=latest,
        state=state,
        preempted=PreemptionFlag(),
        attempt=attempt,
        trackers=make_trackers(config, folder, state),
    )


def make_trackers(config: Mapping[str, Any], folder: Path, state: TrainState) -> Trackers:
    """Returns the trackers of this rank: all on rank 0, none elsewhere."""
    if dist.rank() != 0:
        return Trackers([])
    trackers = [JsonlTracker(folder / "metrics.jsonl", resume_step=state.global_step), ConsoleTracker()]
    if config["tracker"]["wandb"] is not None:
        make = build(config["tracker"]["wandb"])
        trackers.append(make(folder, name=config["name"], run_id=state.run_id, config=dict(config)))
    return Trackers(trackers)


def finish(run: Run) -> None:
    """Evaluates on the held-out sources, unless it was done; the scores are the last record of the metrics.

    Every rank then has all weights on its device, also where they were sharded; never in host memory beside it.
    """
    if not run.config["evaluation"] or dist.broadcast_object(evaluated(run) if dist.rank() == 0 else None):
        return
    evaluation = build(run.config["evaluation"])
    recipe = load_recipe(list(run.schedule.values())[-1].recipe)
    sources = [card_source(recipe, name, Path(run.config["data_root"])) for name in evaluation.sources]
    longest = max(stage.max_length for stage in run.schedule.values())
    settings = build(run.config["data"])
    catalog = read_sources(sources, make_layout(run.encoder, longest, DropTooLong()), settings)
    dataset = RowDataset(catalog, run.encoder, settings.storage)
    run.placement.make_whole(run.model)
    scores = evaluate(run.model, dataset, evaluation, run.folder / "gallery")
    run.trackers.log(scores, run.state.global_step)


def evaluated(run: Run) -> bool:
    """Returns whether the metrics hold the scores of the run's present step."""
    records = read_metrics(run.folder / "metrics.jsonl")
    return any("eval/dropped" in record and record["step"] == run.state.global_step for record in records)
