"""One stage of a run: its data, its engine, its loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from eagle_train import dist
from eagle_train.data.encode import Encoder
from eagle_train.data.ledger import Ledger
from eagle_train.data.loader import RowDataset
from eagle_train.data.step_loader import StepLoader
from eagle_train.data.stream import Cursor, steps
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.tracker import Trackers
from eagle_train.train.assemble import adapters, stage_model
from eagle_train.train.attention_check import check_attention
from eagle_train.train.books import ledger_shards, make_budget, write_accounts
from eagle_train.train.checkpoint import (
    CheckpointDir,
    TrainState,
    read_plan,
    restore_random_states,
    write_state,
)
from eagle_train.train.config import ConfigError, build, to_yaml
from eagle_train.train.costs import ForwardFlops
from eagle_train.train.freeze_proof import FreezeProof
from eagle_train.train.optim import FreezeRow, freeze, freeze_table, freeze_table_view, with_dtypes
from eagle_train.train.placement import Placement
from eagle_train.train.preemption import PreemptionFlag
from eagle_train.train.run_folder import changed_values
from eagle_train.train.schedule import Stage
from eagle_train.train.stage_data import StageData, build_stage_data, fingerprint
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
    """With its weights where `placement` has them; may be sharded."""
    meta: VisionLanguageModel
    """The same on the meta device: names and shapes."""
    placement: Placement
    flops: ForwardFlops
    encoder: Encoder
    schedule: Mapping[str, Stage]
    checkpoints: CheckpointDir
    resume_from: Path | None
    state: TrainState
    preempted: PreemptionFlag
    attempt: int
    trackers: Trackers


def run_stage(run: Run, stage: Stage) -> bool:
    """Runs one stage to its end; returns False if a signal came."""
    data = build_stage_data(run.config, stage, run.encoder, run.flops, run.folder / "plans")
    cursor = tie_plan(run, data)
    model = stage_model(run.config, run.model, stage).train()
    freeze(model, stage.learning_rates, adapters(run.config))
    with torch.device("meta"):  # sharded weights have no shapes
        trained = stage_model(run.config, run.meta, stage)
    table = freeze_table(trained, stage.learning_rates, adapters(run.config))
    micro_batches = -(-stage.rows_per_step // dist.world_size())
    engine = build(run.config["engine"])(model, stage, micro_batches, placement=run.placement)
    if dist.rank() == 0:
        show_stage(run, stage, data, with_dtypes(table, model))
    check_attention(model, engine)
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
        proof=FreezeProof(model, run.placement) if run.config["prove_freeze"] else None,
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
        row_bytes=data.encoder.row_bytes(data.plan.max_length),
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
