"""`python -m eagle_train plan +experiment=NAME [overrides] [--json] [--ranks N]`: look before you run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eagle_train.data.recipe import load_recipe
from eagle_train.model.flops import llm_flops, vision_flops
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.app import freeze_table_view
from eagle_train.train.assemble import build_encoder, build_schedule, build_stage_data, meta_model
from eagle_train.train.config import constructor, load_config
from eagle_train.train.optim import FreezeRow, freeze, freeze_table
from eagle_train.train.schedule import Stage

GIB = 1024**3


def main(arguments: list[str]) -> int:
    """Prints the plan of an experiment; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train plan",
        description="Composes a config, builds the model without memory, and prints parameters, freeze tables, "
        "tokens, FLOPs, rows, steps and memory.",
    )
    parser.add_argument("overrides", nargs="*", help="+experiment=NAME and key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks the memory is planned for")
    options = parser.parse_intermixed_args(arguments)
    plan = make_plan(load_config(options.overrides), options.ranks)
    if options.json:
        print(json.dumps(plan))
    else:
        show(plan, Console())
    return 0


def make_plan(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Returns everything the plan tells, as plain JSON values."""
    model = meta_model(config)
    tile = config["data"]["tile_size"]
    stages = [plan_stage(config, model, name, stage, ranks) for name, stage in build_schedule(config).items()]
    return {
        "experiment": config["name"],
        "ranks": ranks,
        "tokens_per_tile": model.mixture.tokens_per_tile,
        "vision_flops_per_tile": vision_flops(model, tile),
        "encoders": {
            name: {"input_size": e.input_size, "grid": e.grid, "channels": e.channels}
            for name, e in model.mixture.encoders.items()
        },
        "stages": stages,
    }


def plan_stage(
    config: Mapping[str, Any], model: VisionLanguageModel, name: str, stage: Stage, ranks: int
) -> dict[str, Any]:
    """Returns the plan of one stage."""
    freeze(model, stage.learning_rates)
    rows = freeze_table(model, stage.learning_rates)
    total, trainable = sum(row.total for row in rows), sum(row.trainable for row in rows)
    engine = {k: v for k, v in config["engine"].items() if not k.startswith("_")}
    memory = constructor(config["engine"]).state_bytes(total, trainable, ranks, **engine)
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
        "micro_batches": -(-stage.rows_per_step // ranks),
        "llm_flops_per_row": llm_flops(model.llm, stage.max_length),
        "memory_bytes_per_rank": memory,
        "data": plan_data(config, model, stage),
    }


def plan_data(config: Mapping[str, Any], model: VisionLanguageModel, stage: Stage) -> dict[str, Any]:
    """Returns rows, fill and steps where the data is on this machine, else what is missing."""
    recipe = load_recipe(stage.recipe)
    root = Path(config["data_root"])
    missing = [name for name in recipe.sources if not recipe.cards[name].find_shards(root)]
    if missing:
        return {"missing_sources": missing, "num_steps": stage.num_steps}
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    data = build_stage_data(config, stage, encoder)
    tokens = int(data.catalog.lengths[data.rows.samples].sum())
    return {
        "num_rows": len(data.rows),
        "num_steps": data.num_steps,
        "num_samples": len(data.rows.samples),
        "num_tokens": tokens,
        "num_tiles": int(data.catalog.num_tiles[data.rows.samples].sum()),
        "fill": tokens / (len(data.rows) * stage.max_length),
        "dropped": {source: dict(reasons) for source, reasons in data.catalog.dropped().items() if reasons},
        "asked_shares": data.asked_shares(),
    }


def show(plan: Mapping[str, Any], console: Console) -> None:
    """Prints a plan for reading."""
    console.print(f"[bold]{plan['experiment']}[/bold] on {plan['ranks']} rank(s)")
    for name, facts in plan["encoders"].items():
        console.print(f"  {name}: {facts['input_size']} px -> {facts['grid']}x{facts['grid']}x{facts['channels']}")
    console.print(
        f"  {plan['tokens_per_tile']} tokens and {flops(plan['vision_flops_per_tile'])} forward per tile (vision)"
    )
    for stage in plan["stages"]:
        console.print()
        console.print(freeze_table_view(stage["name"], [FreezeRow(**row) for row in stage["freeze_table"]]))
        console.print(
            f"rows of {stage['max_length']} tokens, {stage['rows_per_step']} per step "
            f"({stage['micro_batches']} per rank); {flops(stage['llm_flops_per_row'])} forward per full row (LLM)"
        )
        show_data(stage["data"], console)
        memory = Table(title="memory per rank, without activations")
        for part, size in stage["memory_bytes_per_rank"].items():
            memory.add_row(part, f"{size / GIB:,.2f} GiB")
        memory.add_row("total", f"{sum(stage['memory_bytes_per_rank'].values()) / GIB:,.2f} GiB", style="bold")
        console.print(memory)


def show_data(data: Mapping[str, Any], console: Console) -> None:
    """Prints what a stage's data gives."""
    if "missing_sources" in data:
        console.print(f"not on this machine: {', '.join(data['missing_sources'])}")
        return
    console.print(
        f"{data['num_samples']:,} samples, {data['num_tiles']:,} tiles, {data['num_tokens']:,} tokens in "
        f"{data['num_rows']:,} rows ({data['fill']:.2%} full), {data['num_steps']:,} steps"
    )
    for source, reasons in data["dropped"].items():
        console.print(f"  dropped from {source}: {reasons}", style="yellow")


def flops(value: float) -> str:
    """Returns a number of FLOPs for reading."""
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value / 1e6:,.1f} MFLOP"
