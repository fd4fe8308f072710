"""`python -m eagle_train plan +experiment=NAME [overrides] [--json | --sbatch]`: look before you run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from eagle_train.data.recipe import load_recipe
from eagle_train.data.stream import count_steps
from eagle_train.model.describe import describe
from eagle_train.model.flops import count_flops, llm_flops
from eagle_train.model.geometry import leading_encoder
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.tools.given import given
from eagle_train.tools.sbatch import SCRIPT_OPTIONS, add_arguments, print_script
from eagle_train.tools.stdout import stdout
from eagle_train.train.assemble import adapters, build_encoder, build_schedule, stage_model, trained_meta_model
from eagle_train.train.config import constructor, load_config
from eagle_train.train.costs import ForwardFlops, forward_flops
from eagle_train.train.optim import FreezeRow, freeze, freeze_table, freeze_table_view
from eagle_train.train.row_memory import row_bytes
from eagle_train.train.schedule import Stage
from eagle_train.train.sequence.rows import RowGroups
from eagle_train.train.sequence.spread import check_group
from eagle_train.train.stage_data import build_stage_data, fingerprint

GIB = 1024**3
MAX_NAMES = 12
"""Missing sources that are named; Eagle 2 has 157. The JSON names them all."""


def main(arguments: list[str]) -> int:
    """Prints the plan of an experiment; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train plan",
        description="Composes a config, builds the model without memory, and prints parameters, freeze tables, "
        "tokens, FLOPs, rows, steps and memory.",
    )
    parser.add_argument("overrides", nargs="*", help="+experiment=NAME and key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--ranks", type=int, help="number of ranks the memory is planned for; else those that share a row"
    )
    parser.add_argument(
        "--activations", action="store_true", help="estimate what a full row takes too; seconds for each stage"
    )
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    check_together(parser, options)
    config = load_config(options.overrides)
    if options.sbatch:
        return print_script(options, config)
    ranks = config["engine"]["sequence_parallel"] if options.ranks is None else options.ranks
    if ranks < 1:
        raise ValueError(f"--ranks {ranks} is at least 1")
    plan = make_plan(config, ranks, activations=options.activations)
    if options.json:
        print(json.dumps(plan))
    else:
        show(plan, stdout())
    return 0


def check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with a message if an option would do nothing beside the others."""
    alone = given(parser, options, ["json", "ranks", "activations"])
    if options.sbatch and alone:
        parser.error(f"{', '.join(alone)}: not with --sbatch, which prints the script alone")
    if not options.sbatch and (of_script := given(parser, options, SCRIPT_OPTIONS)):
        parser.error(f"{', '.join(of_script)}: for --sbatch alone")


def make_plan(config: Mapping[str, Any], ranks: int, *, activations: bool = False) -> dict[str, Any]:
    """Returns everything the plan tells, as plain JSON values.

    Args:
        ranks: over which weights, gradients and optimizer state are spread.
        activations: whether the memory of a full row is estimated.

    Raises:
        ValueError: if ranks cannot share rows as the engine is to make them.
    """
    model = trained_meta_model(config)
    groups = RowGroups(rank=0, world_size=ranks, size=config["engine"]["sequence_parallel"])
    check_group(model, groups.size)
    geometry = describe(model.mixture, config["data"]["tile_size"])
    encoders = {name: {**asdict(e), "resampling": e.resampling} for name, e in geometry.encoders.items()}
    tokens = torch.zeros(1, geometry.tokens_per_tile, geometry.channels, device="meta")
    fusion = {"fusion": geometry.fusion_flops, "projector": count_flops(model.projector, tokens)}
    not_built = {f"mixture.encoders.{n}": e.not_built for n, e in model.mixture.encoders.items() if e.not_built}
    flops = forward_flops(model, geometry)
    stages = [
        plan_stage(config, model, flops, name, stage, groups, activations)
        for name, stage in build_schedule(config).items()
    ]
    total = sum(parameter.numel() for parameter in model.parameters())
    return {
        "experiment": config["name"],
        "ranks": ranks,
        "ranks_per_row": groups.size,
        "tile_size": config["data"]["tile_size"],
        "encoders": encoders,
        "mixture": constructor(config["mixture"]).__name__,
        "tokens_per_tile": geometry.tokens_per_tile,
        "channels": geometry.channels,
        "grid_taken_from": grid_taken_from(config, model),
        "fusion_flops_per_tile": fusion,
        "vision_flops_per_tile": sum(e.flops for e in geometry.encoders.values()) + sum(fusion.values()),
        "not_built": not_built,
        "published_parameters": total + sum(sum(parts.values()) for parts in not_built.values()),
        "stages": stages,
    }


def grid_taken_from(config: Mapping[str, Any], model: VisionLanguageModel) -> str | None:
    """Returns the encoder whose grid a mixture with `grid: null` took; None where the config decides."""
    if config["mixture"].get("grid", 0) is not None:
        return None
    return leading_encoder({name: (e.input_size, e.grid) for name, e in model.mixture.encoders.items()})


def plan_stage(
    config: Mapping[str, Any],
    model: VisionLanguageModel,
    flops: ForwardFlops,
    name: str,
    stage: Stage,
    groups: RowGroups,
    activations: bool,
) -> dict[str, Any]:
    """Returns the plan of one stage."""
    with torch.device("meta"):
        trained = stage_model(config, model, stage)
    freeze(trained, stage.learning_rates, adapters(config))
    rows = freeze_table(trained, stage.learning_rates, adapters(config))
    total, trainable = sum(row.total for row in rows), sum(row.trainable for row in rows)
    engine = {k: v for k, v in config["engine"].items() if not k.startswith("_")}
    memory = constructor(config["engine"]).state_bytes(total, trainable, groups.world_size, **engine)
    if activations:
        memory["activations of a full row"] = row_bytes(config, trained, stage.max_length)
    return {
        "name": name,
        "parameters": {
            "total": total,
            "trainable": trainable,
            "modules": {row.module: {"total": row.total, "trainable": row.trainable} for row in rows},
        },
        "freeze_table": [asdict(row) for row in rows],
        "max_length": stage.max_length,
        "rows_per_step": stage.rows_per_step,
        "micro_batches": -(-stage.rows_per_step // groups.data_world_size),
        "llm_flops_per_row": llm_flops(model.llm, stage.max_length),
        "memory_bytes_per_rank": memory,
        "data": plan_data(config, model, stage, flops),
    }


def plan_data(
    config: Mapping[str, Any], model: VisionLanguageModel, stage: Stage, flops: ForwardFlops
) -> dict[str, Any]:
    """Returns rows, fill and steps where the data is on this machine, else what is missing."""
    recipe = load_recipe(stage.recipe)
    root = Path(config["data_root"])
    missing = [name for name in recipe.sources if not recipe.cards[name].is_there(root)]
    if missing:
        word = "build" if all(recipe.cards[name].build for name in missing) else "show"
        remedy = f"data {word} recipe={stage.recipe}"
        return {"missing_sources": missing, "remedy": remedy, "num_steps": stage.num_steps}
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    data = build_stage_data(config, stage, encoder, flops)
    totals = data.totals or count_steps(data.catalog, data.plan, data.num_steps)
    return {
        "num_rows": totals.rows,
        "num_steps": data.num_steps,
        "num_samples": totals.samples,
        "num_tokens": totals.tokens,
        "num_tiles": totals.tiles,
        "fill": totals.tokens / (totals.rows * stage.max_length),
        "dropped": {source: dict(reasons) for source, reasons in data.catalog.dropped().items() if reasons},
        "shortened": {source: asdict(what) for source, what in data.catalog.shortened().items() if what.samples},
        "asked_shares": data.asked,
        "shares_of": data.measure,
        "repeats": {source: float(repeat) for source, repeat in zip(data.asked, data.plan.repeats, strict=True)},
        "fingerprint": fingerprint(data.identity),
    }


def show(plan: Mapping[str, Any], console: Console) -> None:
    """Prints a plan for reading."""
    shared = f", {plan['ranks_per_row']} to a row" if plan["ranks_per_row"] > 1 else ""
    console.print(f"[bold]{plan['experiment']}[/bold] on {plan['ranks']} rank(s){shared}")
    show_geometry(plan, console)
    for stage in plan["stages"]:
        console.print()
        console.print(freeze_table_view(stage["name"], [FreezeRow(**row) for row in stage["freeze_table"]]))
        console.print(
            f"rows of {stage['max_length']} tokens, {stage['rows_per_step']} per step "
            f"({stage['micro_batches']} per rank); {flops(stage['llm_flops_per_row'])} forward per full row (LLM)"
        )
        show_data(stage["data"], console)
        known = "activations of a full row" in stage["memory_bytes_per_rank"]
        memory = Table(title="memory per rank" + ("" if known else ", without activations (--activations)"))
        for part, size in stage["memory_bytes_per_rank"].items():
            memory.add_row(part, f"{size / GIB:,.2f} GiB")
        on_device = sum(size for part, size in stage["memory_bytes_per_rank"].items() if part != "host")
        memory.add_row("total of the device", f"{on_device / GIB:,.2f} GiB", style="bold")
        console.print(memory)


def show_geometry(plan: Mapping[str, Any], console: Console) -> None:
    """Prints what becomes of a tile."""
    table = Table(title=f"from a tile of {plan['tile_size']} px to {plan['tokens_per_tile']} tokens")
    for column in ("encoder", "sees", "features", "resampled", "FLOPs per tile"):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for name, facts in plan["encoders"].items():
        grid, fused = facts["grid"], facts["fused_grid"]
        change = "no" if grid == fused else f"{facts['resampling']} to {fused}x{fused}"
        size = f"{facts['input_size']} px"
        table.add_row(name, size, f"{grid}x{grid}x{facts['channels']}", change, flops(facts["flops"]))
    for part, count in plan["fusion_flops_per_tile"].items():
        table.add_row(part, "", "", "", flops(count))
    total = f"{plan['tokens_per_tile']} x {plan['channels']}"
    table.add_row(plan["mixture"], "", total, "", flops(plan["vision_flops_per_tile"]), style="bold")
    console.print(table)
    for module, parts in plan["not_built"].items():
        unused = ", ".join(f"{part} ({count:,})" for part, count in parts.items())
        console.print(f"  not built, since never used: {module}'s {unused} parameters")
    if plan["not_built"]:
        console.print(f"  with them the model would have {plan['published_parameters']:,} parameters")
    if plan["grid_taken_from"]:
        console.print(f"  grid: that of {plan['grid_taken_from']}, the coarsest of those that see most pixels")


def show_data(data: Mapping[str, Any], console: Console) -> None:
    """Prints what a stage's data gives."""
    if "missing_sources" in data:
        missing = data["missing_sources"]
        more = f" and {len(missing) - MAX_NAMES} more" if len(missing) > MAX_NAMES else ""
        console.print(f"not on this machine: {', '.join(missing[:MAX_NAMES])}{more}; see `{data['remedy']}`")
        return
    console.print(
        f"{data['num_samples']:,} samples, {data['num_tiles']:,} tiles, {data['num_tokens']:,} tokens in "
        f"{data['num_rows']:,} rows ({data['fill']:.2%} full), {data['num_steps']:,} steps"
    )
    for source, reasons in data["dropped"].items():
        console.print(f"  dropped from {source}: {reasons}", style="yellow")
    for source, what in data["shortened"].items():
        lost = f"{what['turns']:,} turns, {what['tokens']:,} tokens"
        console.print(f"  {what['samples']:,} samples of {source} shortened by {lost}", style="yellow")


def flops(value: float) -> str:
    """Returns a number of FLOPs for reading."""
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value / 1e6:,.1f} MFLOP"
