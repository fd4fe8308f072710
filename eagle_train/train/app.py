"""A whole run: the stages of the schedule one after another, resumable at any step, and the evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from eagle_train import dist
from eagle_train.data.encode import Encoder
from eagle_train.data.ledger import Ledger
from eagle_train.data.loader import RowDataset, make_loader
from eagle_train.data.recipe import card_source, load_recipe
from eagle_train.data.too_long import DropTooLong
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.console import ConsoleTracker
from eagle_train.track.jsonl import JsonlTracker, read_metrics
from eagle_train.track.tracker import Trackers
from eagle_train.track.wandb_tracker import new_run_id
from eagle_train.train.assemble import (
    StageData,
    build_encoder,
    build_model,
    build_schedule,
    build_stage_data,
    check_stages,
    read_sources,
    stage_model,
)
from eagle_train.train.books import ledger_shards, make_budget, write_accounts
from eagle_train.train.checkpoint import (
    CheckpointDir,
    TrainState,
    hash_of,
    read_state,
    restore_random_states,
    seed_everything,
    write_state,
)
from eagle_train.train.config import ConfigError, build, to_yaml
from eagle_train.train.evaluate import evaluate
from eagle_train.train.optim import FreezeRow, freeze, freeze_table, with_dtypes
from eagle_train.train.preemption import PreemptionFlag
from eagle_train.train.pretrained import load_start, start_table
from eagle_train.train.run_folder import changed_keys, first_run_id, record_attempt
from eagle_train.train.schedule import Stage
from eagle_train.train.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """What the stages of one run share."""

    config: Mapping[str, Any]
    folder: Path
    model: VisionLanguageModel
    encoder: Encoder
    schedule: Mapping[str, Stage]
    checkpoints: CheckpointDir
    resume_from: Path | None
    state: TrainState
    preempted: PreemptionFlag
    attempt: int
    trackers: Trackers


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
                run.state = replace(run.state, stage=name, step=0)
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
    check_stages(config, schedule)
    checkpoints = CheckpointDir(folder / "checkpoints", config["keep_last"])
    seed_everything(config["seed"])
    model = build_model(config)
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    latest = checkpoints.latest()
    if latest is None:
        run_id = dist.broadcast_object(first_run_id(folder) or new_run_id())
        state = TrainState(stage=next(iter(schedule)), run_id=run_id)
        starts = load_start(model, config["init_from"])
        if dist.rank() == 0:
            Console(stderr=True).print(start_table(starts))
    else:
        state = read_state(latest)
        log.warning("resuming stage %s at step %d from %s", state.stage, state.step, latest)
        if state.stage not in schedule:
            raise ConfigError(f"{latest} is in stage {state.stage!r}; the schedule has {sorted(schedule)}")
        if state.config_hash != hash_of(to_yaml(config)):
            log.warning("the config changed: %s", ", ".join(changed_keys(latest / "config.yaml", config)))
    state.config_hash = hash_of(to_yaml(config))
    attempt = record_attempt(folder, config, state.run_id, latest) if dist.rank() == 0 else None
    attempt = dist.broadcast_object(attempt)
    return Run(
        config=config,
        folder=folder,
        model=model,
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


def run_stage(run: Run, stage: Stage) -> bool:
    """Runs one stage to its end; returns False if a signal came."""
    data = build_stage_data(run.config, stage, run.encoder)
    check_plan(run.state, data)
    run.state.plan = data.fingerprint
    model = stage_model(run.config, run.model, stage).train()
    freeze(model, stage.learning_rates)
    table = freeze_table(model, stage.learning_rates)
    micro_batches = -(-stage.rows_per_step // dist.world_size())
    engine = build(run.config["engine"])(model, stage, micro_batches)
    if dist.rank() == 0:
        show_stage(run, stage, data, with_dtypes(table, model))
    if run.resume_from is not None:
        engine.load(run.resume_from)
        restore_random_states(run.resume_from)
        run.resume_from = None
    ledger = Ledger(run.folder / "ledger", run.state.stage, dist.rank(), run.attempt, ledger_shards(data.catalog))
    dataset = RowDataset(data.catalog, data.encoder, data.rows)
    loader = stage_loader(run, stage, dataset, data.num_steps)

    def save() -> None:
        with run.checkpoints.writing(run.state.global_step) as folder:
            ledger.sync()
            engine.save(folder)
            write_state(folder, run.state, to_yaml(dict(run.config)))

    trainer = Trainer(
        engine=engine,
        batches=iter(loader),
        stage=stage,
        num_steps=data.num_steps,
        micro_batches=micro_batches,
        sources=[source.name for source in data.catalog.sources],
        state=run.state,
        tracker=run.trackers,
        ledger=ledger,
        budget=make_budget(run.folder, run.state, data, build(run.config["data"]).max_bad_share),
        preempted=run.preempted,
        save=save,
        save_every=run.config["save_every"],
        log_every=run.config["log_every"],
    )
    run.trackers.begin_stage(run.state.stage, run.state.step, data.num_steps)
    try:
        finished = trainer.fit()
        dist.barrier()  # every rank's ledger is written
    finally:
        ledger.close()
        dataset.close()
        if dist.rank() == 0:
            write_accounts(run.folder, run.state, stage, data)
    engine.close()
    return finished


def stage_loader(run: Run, stage: Stage, dataset: RowDataset, num_steps: int) -> DataLoader:
    """Returns this rank's rows from the run's present step to the end of the stage."""
    return make_loader(
        dataset,
        steps=range(run.state.step, num_steps),
        rows_per_step=stage.rows_per_step,
        rank=dist.rank(),
        world_size=dist.world_size(),
        num_workers=build(run.config["data"]).num_workers,
        pin_memory=dist.device().type == "cuda",
    )


def check_plan(state: TrainState, data: StageData) -> None:
    """Raises ConfigError if a stage would go on with another plan than it began with, naming what differs."""
    if state.step == 0 or state.plan == data.fingerprint:
        return
    parts = [name for name in data.fingerprint if state.plan.get(name) != data.fingerprint[name]]
    raise ConfigError(
        f"stage {state.stage} stopped at step {state.step} with another {', '.join(parts)}; its rows would not be "
        f"the same. Restore what changed, or start anew with another run_dir"
    )


def show_stage(run: Run, stage: Stage, data: StageData, table: list[FreezeRow]) -> None:
    """Prints the freeze table and the plan of a stage."""
    console = Console(stderr=True)
    console.print(freeze_table_view(run.state.stage, table))
    fill = data.catalog.lengths[data.rows.samples].sum() / (len(data.rows) * stage.max_length)
    console.print(
        f"stage {run.state.stage}: {data.num_steps} steps of {stage.rows_per_step} rows x {stage.max_length} tokens, "
        f"{len(data.rows.samples)} samples, fill {fill:.1%}"
    )


def freeze_table_view(stage: str, rows: list[FreezeRow]) -> Table:
    """Returns the freeze table of a stage for the terminal."""
    table = Table(title=f"stage {stage}: what is trained")
    for column in ("module", "parameters", "trainable", "lr", "dtype"):
        table.add_column(column, justify="left" if column in ("module", "dtype") else "right")
    for row in rows:
        rate = "frozen" if row.learning_rate is None else f"{row.learning_rate:g}"
        table.add_row(row.module, f"{row.total:,}", f"{row.trainable:,}", rate, row.dtype)
    total, trainable = sum(r.total for r in rows), sum(r.trainable for r in rows)
    table.add_row("total", f"{total:,}", f"{trainable:,}", "", "", style="bold")
    return table


def finish(run: Run) -> None:
    """Evaluates on the held-out sources, unless it was done; the scores are the last record of the metrics."""
    if not run.config["evaluation"] or dist.broadcast_object(evaluated(run) if dist.rank() == 0 else None):
        return
    evaluation = build(run.config["evaluation"])
    recipe = load_recipe(list(run.schedule.values())[-1].recipe)
    sources = [card_source(recipe, name, Path(run.config["data_root"])) for name in evaluation.sources]
    longest = max(stage.max_length for stage in run.schedule.values())
    catalog = read_sources(run.config, sources, run.encoder, longest, DropTooLong())
    scores = evaluate(run.model.to(dist.device()), catalog, run.encoder, evaluation, run.folder / "gallery")
    run.trackers.log(scores, run.state.global_step)


def evaluated(run: Run) -> bool:
    """Returns whether the metrics hold the scores of the run's present step."""
    records = read_metrics(run.folder / "metrics.jsonl")
    return any("eval/dropped" in record and record["step"] == run.state.global_step for record in records)
