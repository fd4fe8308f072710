"""One stage of a run: its data, its engine, its loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from eagle_train import dist
from eagle_train.data.encode import Encoder
from eagle_train.data.ledger import Ledger
from eagle_train.data.loader import RowDataset
from eagle_train.data.step_loader import StepLoader
from eagle_train.data.stream import Cursor, Step, steps
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.goodput import Goodput
from eagle_train.track.profiler import Profiler
from eagle_train.track.tracker import Trackers
from eagle_train.train.anomalies import Anomaly, AnomalyGuard, RollBack, read_anomalies, write_anomaly
from eagle_train.train.assemble import adapters, stage_model
from eagle_train.train.attention_check import check_attention
from eagle_train.train.books import ledger_shards, make_budget, write_accounts
from eagle_train.train.checkpoint import (
    TrainState,
    read_plan,
    read_state,
    restore_random_states,
    state_files,
)
from eagle_train.train.config import ConfigError, build
from eagle_train.train.costs import ForwardFlops
from eagle_train.train.engine import Engine
from eagle_train.train.freeze_proof import FreezeProof
from eagle_train.train.heartbeat import Heart
from eagle_train.train.optim import FreezeRow, freeze, freeze_table, freeze_table_view, with_dtypes
from eagle_train.train.placement import Placement
from eagle_train.train.preemption import PreemptionFlag
from eagle_train.train.run_folder import changed_values
from eagle_train.train.saving import Saver, SaveReport
from eagle_train.train.schedule import Stage
from eagle_train.train.sequence.rows import RowGroups
from eagle_train.train.speed import speedometer
from eagle_train.train.stage_data import StageData, build_stage_data, fingerprint
from eagle_train.train.trainer import Trainer
from eagle_train.types import PackedBatch

log = logging.getLogger(__name__)

MANY_PASSES = 4
"""More passes over a source per epoch than this are worth a warning."""


@dataclass(kw_only=True)
class Run:
    """What the stages of one run share."""

    config: Mapping[str, Any]
    text: str
    """The config as YAML."""
    folder: Path
    model: VisionLanguageModel
    """With its weights where `placement` has them; may be sharded."""
    meta: VisionLanguageModel
    """The same on the meta device: names and shapes."""
    placement: Placement
    flops: ForwardFlops
    encoder: Encoder
    schedule: Mapping[str, Stage]
    saver: Saver
    resume_from: Path | None
    state: TrainState
    preempted: PreemptionFlag
    heart: Heart
    attempt: int
    trackers: Trackers
    goodput: Goodput
    profiler: Profiler | None


def run_stage(run: Run, stage: Stage) -> bool:
    """Runs one stage to its end; returns False if it was asked to stop before.

    Raises:
        RollBack: if the run is to go on from its newest checkpoint.
        Preempted: if it was asked to stop before its first step.
    """
    run.heart.beat("start", run.state.global_step)
    with run.goodput.phase("data"):
        data = build_stage_data(
            run.config, stage, run.encoder, run.flops, run.folder / "plans", stop=run.preempted.wanted
        )
    cursor = tie_plan(run, data)
    groups = RowGroups(rank=dist.rank(), world_size=dist.world_size(), size=run.config["engine"]["sequence_parallel"])
    micro_batches = -(-stage.rows_per_step // groups.data_world_size)
    model, engine = build_engine(run, stage, data, micro_batches)
    if run.config["watchdog"] is not None:  # which ends a run that is stuck, and says who is to blame; a group cannot
        dist.wait_at_most(build(run.config["watchdog"]).collective_seconds)
    resume(run, engine)
    guard = make_guard(run)
    ledger = Ledger(run.folder / "ledger", run.state.stage, dist.rank(), run.attempt, ledger_shards(data.catalog))
    dataset = RowDataset(data.catalog, data.encoder, data.settings.storage, left_out=guard.left_out())
    loader = stage_loader(run, data, dataset, micro_batches, cursor, groups)
    run.heart.data_keys = loader.awaited
    rows = iter(loader)
    trainer = make_trainer(run, stage, data, engine, ledger, groups.own_parts(rows), guard)
    trainer.proof = FreezeProof(model, run.placement) if run.config["prove_freeze"] else None
    run.trackers.begin_stage(run.state.stage, run.state.step, data.num_steps)
    run.preempted.begin_stage()
    try:
        with run.goodput.phase("training"):
            finished = trainer.fit()
        if finished and (last := run.saver.last) and last.trouble:
            raise OSError(f"stage {run.state.stage} is trained, but its end could not be saved: {last.trouble}")
        dist.barrier()  # every rank's ledger is written
    except RollBack:
        engine.close()
        raise
    finally:
        if trainer.proof is not None:  # there was no update
            trainer.proof.close()
        rows.close()  # ends the workers, also where an error keeps them from being forgotten
        ledger.close()
        dataset.close()
        if dist.rank() == 0:
            write_accounts(run.folder, run.state, data)
    engine.close()
    return finished


def build_engine(run: Run, stage: Stage, data: StageData, micro_batches: int) -> tuple[nn.Module, Engine]:
    """Returns what a stage trains and its engine, having shown the plan and proven that samples do not leak."""
    model = stage_model(run.config, run.model, stage).train()
    freeze(model, stage.learning_rates, adapters(run.config))
    with torch.device("meta"):  # sharded weights have no shapes
        trained = stage_model(run.config, run.meta, stage)
    table = freeze_table(trained, stage.learning_rates, adapters(run.config))
    attention = model.attention  # of a rank by itself; an engine may make ranks share it
    engine = build(run.config["engine"])(model, stage, micro_batches, placement=run.placement)
    if dist.rank() == 0:
        show_stage(run, stage, data, with_dtypes(table, model))
    check_attention(model, attention, engine)
    return model, engine


def make_trainer(
    run: Run,
    stage: Stage,
    data: StageData,
    engine: Engine,
    ledger: Ledger,
    steps: Iterator[tuple[Step, list[PackedBatch]]],
    guard: AnomalyGuard,
) -> Trainer:
    """Returns the loop of a stage."""
    flops, meter = speedometer(run.config, run.meta, run.state.stage, stage)

    @contextmanager
    def standstill() -> Iterator[None]:
        run.heart.beat("save", run.state.global_step)
        with run.goodput.phase("checkpoint"):
            yield

    def save(*, wait: bool = True) -> SaveReport:
        run.goodput.saved()
        with run.goodput.phase("checkpoint"):
            ledger.sync()
            files = state_files(run.state, run.text, data.identity)
            report = run.saver.save(engine, run.state.global_step, files, wait=wait)
        settle(run, report.before)
        settle(run, report)
        return report

    return Trainer(
        engine=engine,
        steps=steps,
        stage=stage,
        num_steps=data.num_steps,
        sources=[source.name for source in data.catalog.sources],
        state=run.state,
        tracker=run.trackers,
        ledger=ledger,
        budget=make_budget(run.folder, run.state, data, data.settings.max_bad_share),
        preempted=run.preempted,
        heart=run.heart,
        save=save,
        save_every=run.config["save_every"],
        log_every=run.config["log_every"],
        poll=lambda: settle(run, run.saver.poll(standstill)),
        meter=meter,
        flops=flops,
        goodput=run.goodput,
        profiler=run.profiler,
        guard=guard,
        record=partial(record_anomaly, run),
        can_return=partial(can_return, run),
    )


def make_guard(run: Run) -> AnomalyGuard:
    """Returns the guard of the run's present stage; all ranks call it."""
    past = dist.broadcast_object(read_anomalies(run.folder) if dist.rank() == 0 else None)
    policy = build(run.config["anomalies"])
    return AnomalyGuard(policy=policy, stage=run.state.stage, losses=run.state.recent_losses, past=past)


def can_return(run: Run) -> bool:
    """Returns whether the present stage has a whole checkpoint; the run then resumes from it. All ranks call it."""
    settle(run, run.saver.finish())
    latest = run.saver.checkpoints.latest(accept_none=True)  # none: the run stops, and saves its state
    if latest is None or read_state(latest).stage != run.state.stage:
        return False
    run.resume_from = latest
    return True


def record_anomaly(run: Run, anomaly: Anomaly) -> None:
    """Writes an anomaly down and says what is done about it."""
    if dist.rank() == 0:
        write_anomaly(run.folder, anomaly)
        log.warning("%s", anomaly.in_words())


def resume(run: Run, engine: Engine) -> None:
    """Restores what the run resumes from, if this is its first stage since its start."""
    if run.resume_from is None:
        return
    with run.goodput.phase("resume"):
        engine.load(run.resume_from)
        restore_random_states(run.resume_from)
    run.resume_from = None


def settle(run: Run, report: SaveReport | None) -> None:
    """Records how a save went, once that is known, and how long the next may take."""
    if report is None or not (report.published or report.trouble):
        return
    if report.published:
        run.preempted.saved(report.seconds)
    run.trackers.log(report.metrics(), run.state.global_step)


def stage_loader(
    run: Run, data: StageData, dataset: RowDataset, micro_batches: int, cursor: Cursor | None, groups: RowGroups
) -> StepLoader:
    """Returns the rows of this rank's group from the run's present step to the end of the stage."""
    return StepLoader(
        dataset=dataset,
        steps=steps(data.catalog, data.plan, first=run.state.step, end=data.num_steps, cursor=cursor),
        rank=groups.data_rank,
        world_size=groups.data_world_size,
        micro_batches=micro_batches,
        num_workers=data.settings.num_workers,
        prefetch=data.settings.prefetch,
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
