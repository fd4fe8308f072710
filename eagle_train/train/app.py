"""A whole run: the stages of the schedule one after another, resumable at any step, and the evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from eagle_train import dist
from eagle_train.data.encode import Encoder
from eagle_train.data.ledger import Ledger
from eagle_train.data.loader import RowDataset
from eagle_train.data.recipe import card_source, load_recipe
from eagle_train.data.row_buffers import row_bytes
from eagle_train.data.step_loader import StepLoader
from eagle_train.data.stream import Cursor, steps
from eagle_train.data.too_long import DropTooLong
from eagle_train.model.describe import describe
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.console import ConsoleTracker
from eagle_train.track.jsonl import JsonlTracker, read_metrics
from eagle_train.track.tracker import Trackers
from eagle_train.track.wandb_tracker import new_run_id
from eagle_train.train.assemble import (
    build_encoder,
    build_model,
    build_schedule,
    check_stages,
    meta_model,
    stage_model,
)
from eagle_train.train.books import ledger_shards, make_budget, write_accounts
from eagle_train.train.checkpoint import (
    CheckpointDir,
    TrainState,
    hash_of,
    read_plan,
    read_state,
    restore_random_states,
    seed_everything,
    write_state,
)
from eagle_train.train.config import ConfigError, build, to_yaml
from eagle_train.train.costs import ForwardFlops, forward_flops
from eagle_train.train.evaluate import evaluate
from eagle_train.train.optim import FreezeRow, freeze, freeze_table, freeze_table_view, with_dtypes
from eagle_train.train.preemption import PreemptionFlag
from eagle_train.train.pretrained import load_run_start, start_table
from eagle_train.train.run_folder import changed_keys, changed_values, first_run_id, record_attempt
from eagle_train.train.schedule import Stage
from eagle_train.train.stage_data import StageData, build_stage_data, fingerprint, make_layout, read_sources
from eagle_train.train.trainer import Trainer

log = logging.getLogger(__name__)

MANY_PASSES = 4
"""More passes over a source per epoch than this are worth a warning."""


@dataclass(kw_only=True)
class Run:
    """What the stages of one run share."""

    config: Mapping[str, Any]
    folder: Path
    model: VisionLanguageModel
    flops: ForwardFlops
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
    check_stages(config, meta, schedule)
    checkpoints = CheckpointDir(folder / "checkpoints", config["keep_last"])
    seed_everything(config["seed"])
    model = build_model(config)
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    latest = checkpoints.latest()
    if latest is None:
        run_id = dist.broadcast_object(first_run_id(folder) or new_run_id())
        state = TrainState(stage=next(iter(schedule)), run_id=run_id)
        starts = load_run_start(config, model, encoder.tokenizer)
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


def run_stage(run: Run, stage: Stage) -> bool:
    """Runs one stage to its end; returns False if a signal came."""
    data = build_stage_data(run.config, stage, run.encoder, run.flops, run.folder / "plans")
    cursor = tie_plan(run, data)
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
    dataset = RowDataset(data.catalog, data.encoder, build(run.config["data"]).storage)

    def save() -> None:
        with run.checkpoints.writing(run.state.global_step) as folder:
            ledger.sync()
            engine.save(folder)
            write_state(folder, run.state, to_yaml(dict(run.config)), data.identity)

    rows = iter(stage_loader(run, data, dataset, micro_batches, cursor))
    trainer = Trainer(
        engine=engine,
        steps=rows,
        stage=stage,
        num_steps=data.num_steps,
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
        rows.close()  # ends the workers, also where an error keeps them from being forgotten
        ledger.close()
        dataset.close()
        if dist.rank() == 0:
            write_accounts(run.folder, run.state, data)
    engine.close()
    return finished


def stage_loader(
    run: Run, data: StageData, dataset: RowDataset, micro_batches: int, cursor: Cursor | None
) -> StepLoader:
    """Returns this rank's rows from the run's present step to the end of the stage."""
    settings = build(run.config["data"])
    return StepLoader(
        dataset=dataset,
        steps=steps(data.catalog, data.plan, first=run.state.step, end=data.num_steps, cursor=cursor),
        rank=dist.rank(),
        world_size=dist.world_size(),
        micro_batches=micro_batches,
        num_workers=settings.num_workers,
        prefetch=settings.prefetch,
        pin_memory=dist.device().type == "cuda",
        row_bytes=row_bytes(data.plan.max_length, data.encoder.tokens_per_tile, data.encoder.tile_size),
    )


def tie_plan(run: Run, data: StageData) -> Cursor | None:
    """Ties the run to a stage's plan; returns where its rows go on, None: to be found from the beginning.

    Raises:
        ConfigError: if the stage would go on with another plan than it began with, naming what differs.
    """
    print_of_plan, state = fingerprint(data.identity), run.state
    same = state.plan == print_of_plan
    if state.step and not same:
        differences = changed_values(read_plan(run.resume_from), data.identity)
        what = f"stage {state.stage} stopped at step {state.step} with another plan: {'; '.join(differences)}"
        if not run.config["accept_changed_plan"]:
            raise ConfigError(
                f"{what}. Its rows would not be the same. Restore what changed, start anew with another run_dir, or go "
                f"on at step {state.step} of the new plan with accept_changed_plan=true"
            )
        log.warning("%s; going on at step %d of the new plan, as accept_changed_plan says", what, state.step)
    state.plan = print_of_plan
    return Cursor(**state.cursor) if state.step and same else None


def show_stage(run: Run, stage: Stage, data: StageData, table: list[FreezeRow]) -> None:
    """Prints the freeze table and the plan of a stage."""
    console = Console(stderr=True)
    console.print(freeze_table_view(run.state.stage, table))
    console.print(
        f"stage {run.state.stage}: {data.num_steps} steps of {stage.rows_per_step} rows x {stage.max_length} tokens"
    )
    if data.totals:
        fill = data.totals.tokens / (data.totals.rows * stage.max_length)
        console.print(f"  {data.totals.samples:,} samples in {data.totals.rows:,} rows, {fill:.2%} full")
    for name, repeat in zip(data.asked, data.plan.repeats, strict=True):
        if repeat > MANY_PASSES:
            console.print(f"  source {name} comes {float(repeat):.3g} times in every epoch", style="yellow")


def finish(run: Run) -> None:
    """Evaluates on the held-out sources, unless it was done; the scores are the last record of the metrics."""
    if not run.config["evaluation"] or dist.broadcast_object(evaluated(run) if dist.rank() == 0 else None):
        return
    evaluation = build(run.config["evaluation"])
    recipe = load_recipe(list(run.schedule.values())[-1].recipe)
    sources = [card_source(recipe, name, Path(run.config["data_root"])) for name in evaluation.sources]
    longest = max(stage.max_length for stage in run.schedule.values())
    settings = build(run.config["data"])
    catalog = read_sources(sources, make_layout(run.encoder, longest, DropTooLong()), settings)
    dataset = RowDataset(catalog, run.encoder, settings.storage)
    scores = evaluate(run.model.to(dist.device()), dataset, evaluation, run.folder / "gallery")
    run.trackers.log(scores, run.state.global_step)


def evaluated(run: Run) -> bool:
    """Returns whether the metrics hold the scores of the run's present step."""
    records = read_metrics(run.folder / "metrics.jsonl")
    return any("eval/dropped" in record and record["step"] == run.state.global_step for record in records)
