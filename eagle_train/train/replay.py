"""Replaying a step of a run: its rows from the ledger, and its loss with the weights that it began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from eagle_train.data.ledger_read import LedgerFile, open_files
from eagle_train.data.loader import RowDataset
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.data.replay import RebuiltRow, last_step
from eagle_train.track.jsonl import read_metrics
from eagle_train.train.assemble import (
    adapters,
    add_adapters,
    build_encoder,
    build_model,
    build_schedule,
    load_tokenizer,
    meta_model,
    stage_model,
)
from eagle_train.train.checkpoint import (
    CheckpointDir,
    read_state,
    restore_random_states,
    seed_everything,
)
from eagle_train.train.config import build
from eagle_train.train.engine import PlainEngine
from eagle_train.train.load import load_weights, parse_config, read_checkpoint_weights, without_aligner
from eagle_train.train.manifest import problem
from eagle_train.train.optim import freeze
from eagle_train.train.placement import Construction
from eagle_train.train.pretrained import load_run_start
from eagle_train.train.schedule import Stage
from eagle_train.train.source_losses import mean_losses, sums_by_source
from eagle_train.train.stage_data import make_layout, of_stage, read_sources


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a global step is in its run."""

    stage: str
    step: int
    """From 0 in its stage, as in the ledger."""
    global_step: int
    """From 1 through all stages, as in metrics.jsonl."""
    files: Sequence[LedgerFile]
    """The stage's ledger."""


def find_step(run: Path, config: Mapping[str, Any], global_step: int) -> Place:
    """Returns the stage and stage step of a global step, counted in the ledger.

    Raises:
        ValueError: if the run has no such step on record.
    """
    before, known = 0, []
    for stage in config["schedule"]:
        files = open_files(run / "ledger", stage)
        steps = last_step(files) + 1
        if before < global_step <= before + steps:
            return Place(stage=stage, step=global_step - before - 1, global_step=global_step, files=files)
        known += [f"{stage} {before + 1} to {before + steps}"] if steps else []
        before += steps
    steps = ", ".join(known) or "none yet"
    raise ValueError(f"{run} has no step {global_step} on record; its steps, as in metrics.jsonl: {steps}")


def steps_on_record(run: Path, config: Mapping[str, Any]) -> int:
    """Returns how many global steps the ledger holds: those that `find_step` finds."""
    return sum(last_step(open_files(run / "ledger", stage)) + 1 for stage in config["schedule"])


def config_of_run(run: Path) -> dict[str, Any]:
    """Returns the config of a run's newest start.

    Raises:
        ValueError: if there is none, or it is of an earlier version.
    """
    path = run / "config.yaml"
    if not path.is_file() or not (run / "ledger").is_dir():
        raise ValueError(f"{run} is no run that has begun to train: it has no config.yaml and ledger; give its run_dir")
    return parse_config(path)


def stage_dataset(config: Mapping[str, Any], stage: Stage) -> RowDataset:
    """Returns what makes the rows of a stage; neither its budget of bad samples nor a quarantine list counts."""
    settings = replace(build(config["data"]), max_bad_share=1.0, quarantine=None)
    sources = recipe_sources(load_recipe(stage.recipe), Path(config["data_root"]))
    sources = [replace(source, max_bad_share=None) for source in sources]
    model = meta_model(config)
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    encoder = of_stage(encoder, stage)
    catalog = read_sources(sources, make_layout(encoder, stage.max_length, settings.too_long), settings)
    return RowDataset(catalog, encoder, settings.storage)


def checkpoints(run: Path) -> dict[int, Path]:
    """Returns the whole checkpoints of a run by the global step after which they were written."""
    whole = [path for path in CheckpointDir(run / "checkpoints").published() if problem(path) is None]
    return {read_state(path).global_step: path for path in whole}


def given_checkpoint(path: Path, global_step: int) -> Path:
    """Returns a checkpoint that holds the weights before a step.

    Raises:
        ValueError: if it is incomplete, or of another step.
    """
    if (trouble := problem(path)) is not None:
        raise ValueError(f"{path} is no whole checkpoint: {trouble}")
    after = read_state(path).global_step
    if after != global_step - 1:
        raise ValueError(
            f"{path} holds the weights after step {after}: with it, step {after + 1} can be checked, not {global_step}"
        )
    return path


def weights_before(config: Mapping[str, Any], place: Place, checkpoint: Path | None) -> PlainEngine:
    """Returns a plain engine with the weights that a step began with.

    Args:
        checkpoint: of the step before; None, for the first step: the weights that the run began with.
    """
    stage = build_schedule(config)[place.stage]
    seed_everything(config["seed"])
    construction = Construction(partial(build_model, config), PlainEngine.weights())
    model = construction.model
    if checkpoint is None:
        tokenizer = load_tokenizer(config["tokenizer"], config["new_tokens"])
        load_run_start(config, model, tokenizer, put=construction.put)
    add_adapters(config, model)
    construction.finish(initial=checkpoint is None)
    within = checkpoint is not None and read_state(checkpoint).stage == place.stage
    if checkpoint is not None and not within:  # the end of the stage before
        load_weights(model, without_aligner(read_checkpoint_weights(checkpoint)))
    trained = stage_model(config, model, stage)
    if within:
        load_weights(trained, read_checkpoint_weights(checkpoint))
        restore_random_states(checkpoint)
    freeze(trained.train(), stage.learning_rates, adapters(config))
    return PlainEngine(trained, stage, 1, bf16=config["engine"].get("bf16"))


def step_losses(engine: PlainEngine, rows: Sequence[RebuiltRow], sources: list[str]) -> dict[str, float]:
    """Returns the mean losses of a step as the trainer logs them: summed rank by rank, in float64."""
    sums = torch.zeros(len(sources), 2, dtype=torch.float64)
    for _, of_rank in groupby(rows, lambda row: row.recorded.rank):
        sums += sum(run_rows(engine, of_rank, sources))
    return mean_losses(sums, sources)


def run_rows(engine: PlainEngine, rows: Iterator[RebuiltRow], sources: list[str]) -> Iterator[torch.Tensor]:
    """Yields the sums of each row, see `sums_by_source`."""
    for row in rows:
        batch = row.batch.to(engine.device)
        torch.manual_seed(engine.stage.row_seed(batch.row))  # layers and inputs that are left out are those of the row
        # With gradients, though none are wanted: without them other kernels may run.
        yield sums_by_source(batch, (engine.forward(batch) * batch.loss_weights).detach(), sources).cpu()


def recorded_losses(run: Path, config: Mapping[str, Any], place: Place) -> dict[str, float]:
    """Returns the losses that the metrics hold of one step alone; none if it was not logged, or with others."""
    path = run / "metrics.jsonl"
    records = [r for r in (read_metrics(path) if path.is_file() else []) if "train/loss" in r]
    steps = {record["step"]: record for record in records}
    alone = config["log_every"] == 1 or place.step == 0 or place.global_step - 1 in steps
    record = steps.get(place.global_step, {}) if alone else {}
    return {name: value for name, value in record.items() if name.startswith("train/loss")}
