"""A whole run: the stages of the schedule one after another, resumable at any step, and the evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from eagle_train import dist
from eagle_train.data.loader import RowDataset
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import card_source
from eagle_train.data.too_long import DropTooLong
from eagle_train.model.describe import describe
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.console import ConsoleTracker
from eagle_train.track.goodput import FILE as GOODPUT
from eagle_train.track.goodput import Goodput
from eagle_train.track.jsonl import JsonlTracker, read_metrics
from eagle_train.track.timeline import in_words
from eagle_train.track.tracker import Trackers
from eagle_train.track.wandb_tracker import new_run_id
from eagle_train.train.anomalies import RollBack
from eagle_train.train.assemble import (
    add_adapters,
    assemble_model,
    build_encoder,
    build_placement,
    build_schedule,
    check_stages,
    trained_meta_model,
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
from eagle_train.train.heartbeat import Heart
from eagle_train.train.placement import Construction
from eagle_train.train.preemption import Preempted, PreemptionFlag, requeue
from eagle_train.train.pretrained import load_run_start, start_table
from eagle_train.train.retention import Retention
from eagle_train.train.run_folder import changed_keys, first_run_id, record_attempt
from eagle_train.train.saving import Saver
from eagle_train.train.schedule import Stage
from eagle_train.train.serving import served
from eagle_train.train.stage_data import make_layout, read_sources
from eagle_train.train.stage_run import Run, run_stage
from eagle_train.train.watchdog import Watchdog, new_folder

log = logging.getLogger(__name__)


def train(config: Mapping[str, Any], started: float | None = None) -> bool:
    """Runs or resumes the run a config describes; returns whether it is complete.

    False: it was asked to stop, has saved its state, and is requeued if SLURM runs it. Everything of the run is under
    `run_dir`; the same config resumes from its newest complete checkpoint.

    Args:
        started: when this process began, in seconds since 1970, for the account of the run's time; None: now.
    """
    preempted = build(config["preemption"])  # first of all: a signal while the model is built must not kill the run
    with ExitStack() as stack:
        stack.callback(preempted.close)
        dist.init()
        heart = Heart()
        run = start(config, preempted, heart, stack, started)
        preempted.writing = run.saver.writing
        complete = run_stages(run)
        if not complete:
            requeue()
    dist.shutdown()
    return complete


def run_stages(run: Run) -> bool:
    """Runs the stages that are left and the evaluation; returns False if it was asked to stop before the end."""
    failed = False
    try:
        names = list(run.schedule)
        place = names.index(run.state.stage)
        while place < len(names):
            name = names[place]
            if run.state.stage != name:
                run.state = replace(
                    run.state, stage=name, step=0, plan="", cursor={}, read={}, recent_losses=[], loss_sums={}
                )
            try:
                if not run_stage(run, run.schedule[name]):
                    log.warning("preempted at step %d; %s", run.state.global_step, after_preemption(run))
                    return False
                place += 1
            except Preempted:
                log.warning(
                    "preempted before step %d of stage %s; what was built of its data stays", run.state.step, name
                )
                return False
            except RollBack:
                run.heart.beat("save", run.state.global_step)
                roll_back(run)
        run.preempted.close()  # a signal now ends the process at once: there is nothing left to save
        run.heart.beat("evaluate", run.state.global_step)
        with run.goodput.phase("evaluation"):
            finish(run)
        return True
    except BaseException:
        failed = True
        raise
    finally:
        with run.goodput.phase("other"), ExitStack() as stack:
            if run.profiler is not None:
                stack.callback(run.profiler.close)
            stack.callback(run.trackers.close, failed=failed)
        if dist.rank() == 0:
            log.warning(in_words(run.goodput.seconds()))


def roll_back(run: Run) -> None:
    """Makes the run go on from the checkpoint that `can_return` found, as if it had been started again.

    All ranks call it.
    """
    if run.profiler is not None:
        run.profiler.close()
    run.state = replace(read_state(run.resume_from), config_hash=run.state.config_hash)
    run.goodput.resumed(run.state.global_step)
    attempt = record_attempt(run.folder, run.text, run.state.run_id, run.resume_from) if dist.rank() == 0 else None
    run.attempt = dist.broadcast_object(attempt)
    run.trackers.close()
    run.trackers = make_trackers(run.config, run.folder, run.state)
    log.warning("going on from step %d of stage %s", run.state.step, run.state.stage)


def after_preemption(run: Run) -> str:
    """Returns what became of the state of a run that was asked to stop, and what to do."""
    if run.saver.last.published:
        return "state saved, run the same command to go on"
    return "THE STATE COULD NOT BE SAVED; the same command goes on from the checkpoint before"


def start_watchdog(config: Mapping[str, Any], heart: Heart) -> Watchdog | ExitStack:
    """Returns the watchdog of this start of the run, or something else to close where the config has none."""
    if config["watchdog"] is None:
        return ExitStack()
    limits = build(config["watchdog"])
    dist.wait_at_most(limits.collective_seconds)  # of building the model too
    return Watchdog(new_folder(Path(config["run_dir"])), heart, limits)


def start(
    config: Mapping[str, Any], preempted: PreemptionFlag, heart: Heart, stack: ExitStack, started: float | None = None
) -> Run:
    """Returns a run ready for its first or next stage; one that lacks something it needs leaves nothing behind.

    Args:
        stack: closes the run's watchdog and its account of time.
        started: see `train`.
    """
    folder, text = Path(config["run_dir"]), to_yaml(dict(config))
    schedule, meta = checked(config)
    checkpoints = CheckpointDir(folder / "checkpoints", make_retention(config))
    seed_everything(config["seed"])
    placement = build_placement(config["engine"])
    stack.callback(start_watchdog(config, heart).close)  # from here on ranks wait for each other's weights
    construction = Construction(lambda: assemble_model(config, build(config["mixture"])), placement)
    model = construction.model
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    latest = checkpoints.latest(accept_none=config["accept_lost_checkpoints"])
    if latest is None:
        run_id = dist.broadcast_object(first_run_id(folder) or new_run_id())
        state = TrainState(stage=next(iter(schedule)), run_id=run_id)
        starts = load_run_start(config, model, encoder.tokenizer, put=construction.put, reads=construction.counts)
        if dist.rank() == 0:
            Console(stderr=True).print(start_table(starts))
    else:
        state = read_state(latest)
        log.warning("resuming stage %s at step %d from %s", state.stage, state.step, latest)
        if state.stage not in schedule:
            raise ConfigError(f"{latest} is in stage {state.stage!r}; the schedule has {sorted(schedule)}")
        if state.config_hash != hash_of(text):
            log.warning("the config changed: %s", ", ".join(changed_keys(latest / "config.yaml", config)))
    add_adapters(config, model)
    construction.finish(initial=latest is None)
    state.config_hash = hash_of(text)
    goodput = Goodput(folder / GOODPUT if dist.rank() == 0 else None, started=started)
    stack.callback(goodput.close)
    goodput.resumed(state.global_step)
    attempt = record_attempt(folder, text, state.run_id, latest) if dist.rank() == 0 else None
    attempt = dist.broadcast_object(attempt)
    return Run(
        config=config,
        text=text,
        folder=folder,
        model=model,
        meta=meta,
        placement=placement,
        flops=forward_flops(meta, describe(meta.mixture, config["data"]["tile_size"])),
        encoder=encoder,
        schedule=schedule,
        saver=Saver(checkpoints, background=config["async_save"], max_failures=config["max_failed_saves"]),
        resume_from=latest,
        state=state,
        preempted=preempted,
        heart=heart,
        attempt=attempt,
        trackers=make_trackers(config, folder, state),
        goodput=goodput,
        profiler=build(config["profiler"])(folder) if config["profiler"] else None,
    )


def checked(config: Mapping[str, Any]) -> tuple[dict[str, Stage], VisionLanguageModel]:
    """Returns the stages, which could all begin, and the model on the meta device."""
    schedule, meta = build_schedule(config), trained_meta_model(config)
    check_stages(config, meta, schedule)
    return schedule, meta


def make_retention(config: Mapping[str, Any]) -> Retention:
    """Returns which checkpoints stay."""
    best = build(config["keep_best"]) if config["keep_best"] else None
    return Retention(last=config["keep_last"], every=config["keep_every"], best=best)


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

    Sharded weights then lie whole on every rank's device, or are gathered layer by layer, see `served`.
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
    with served(run.placement, run.model, run.meta, evaluation.whole_weights) as access:
        scores = evaluate(run.model, dataset, evaluation, run.folder / "gallery", access)
    run.trackers.log(scores, run.state.global_step)


def evaluated(run: Run) -> bool:
    """Returns whether the metrics hold the scores of the run's present step."""
    records = read_metrics(run.folder / "metrics.jsonl")
    return any("eval/dropped" in record and record["step"] == run.state.global_step for record in records)
