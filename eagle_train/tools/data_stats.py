"""`python -m eagle_train data stats`: lengths, media, shares and a simulated plan, for any tokenizer and row length."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eagle_train.data.catalog import Catalog, Source
from eagle_train.data.index_jobs import Wanted, build_shard, make_works
from eagle_train.data.mixing import MEASURES, asked_shares, repeats
from eagle_train.data.open_catalog import open_catalog
from eagle_train.data.plan import PlanConfig
from eagle_train.data.simulate import Simulation, simulate
from eagle_train.data.stats import Stats, merge, no_stats
from eagle_train.data.storage import exists
from eagle_train.data.work_pool import run_all
from eagle_train.tools.data_arguments import (
    Rows,
    check_keys,
    experiment_rows,
    is_experiment,
    parse_values,
    plain_rows,
    split_own,
    whole,
)
from eagle_train.tools.pages import write_page
from eagle_train.tools.stats_view import COLUMNS, NAMES, brief, show
from eagle_train.tools.stdout import stdout
from eagle_train.track.console import progress
from eagle_train.train.stage_data import describe_layout, fingerprint

HELP = """Lengths, media and shares of data sets, and a simulated plan, without decoding a pixel or a model's weights.

  data stats +experiment=NAME [key=value ...] [stage=NAME]
      the sources, tiling, cost and steps of a run's stages; overrides as for training
  data stats recipe=NAME | tars=GLOB tokenizer=FOLDER chat_template=NAME [data_root=data] [index_dir=DIR]
             [rows_per_step=64] [tokens_per_tile=256] [too_long=drop|keep_turns]
      without a model: one epoch, images and videos as in configs/data/default.yaml, costs counted in tokens

  max_length=4096,16384   tokens of a row, one or several to compare (default: the stage's, or 4096)
  ranks=64                that the rows of a step are dealt to
  workers=1               processes
  --json                  print one JSON object
  --html FILE             write one self-contained page instead of printing tables

Bad samples are counted, they stop nothing. What was counted is kept beside the shards.
"""
OWN = ("stage", "max_length", "rows_per_step", "ranks", "workers")
SOURCE_KEYS = {"recipe", "tars", "data_root", "index_dir", "media_root"}
KEYS = SOURCE_KEYS | {"tokenizer", "chat_template", "too_long", "tokens_per_tile", *OWN}
RANKS = 64


def main(arguments: Sequence[str]) -> int:
    """Prints the statistics; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train data stats",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("arguments", nargs="+", help="key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, help="write one self-contained HTML page")
    options = parser.parse_intermixed_args(arguments)
    if is_experiment(options.arguments):
        overrides, values = split_own(options.arguments, OWN)
        rows_per_step = whole(values, "rows_per_step", 1) if "rows_per_step" in values else None
        rows = experiment_rows(overrides, values.get("stage"), lengths_of(values), rows_per_step)
    else:
        values = parse_values(options.arguments)
        check_keys(values, KEYS - {"stage"})
        rows = plain_rows(values, lengths_of(values) or [4096])
    found = make_stats(rows, whole(values, "ranks", RANKS), whole(values, "workers", 1))
    if options.html:
        print(write_page(options.html, "stats.html.jinja", **found, columns=COLUMNS, names=NAMES, brief=brief))
    if options.json:
        print(json.dumps(found))
    elif not options.html:
        show(found, stdout())
    return 0


def lengths_of(values: Mapping[str, str]) -> list[int]:
    """Returns the row lengths of `max_length=`, none if it is not given."""
    texts = values["max_length"].split(",") if "max_length" in values else []
    return [whole({"max_length": text.strip()}, "max_length", 1) for text in texts]


def make_stats(rows: Sequence[Rows], ranks: int, workers: int) -> dict[str, Any]:
    """Returns all that is told, as plain JSON values: of samples by name of the rows, and a plan of each rows.

    Raises:
        ValueError: if a shard cannot be indexed.
    """
    # Lengths and media may not depend on the length of rows: what stage and sources share is measured once.
    alike: dict[tuple, list[int]] = {}
    for number, each in enumerate(rows):
        alike.setdefault(measured_by(each), []).append(number)
    names = {group[0]: name_of([rows[number] for number in group]) for group in alike.values()}
    stats = {number: {source.name: no_stats() for source in rows[number].sources} for number in names}
    works = [work for work in make_works([each.sources for each in rows]) if exists(work.shard)]
    wanted = Wanted(layouts=[each.layout for each in rows], measured=frozenset(stats), storage=rows[0].storage)
    with progress("measuring", len(works)) as advance:
        for work, report in run_all(partial(build_shard, wanted), works, workers, len(works)):
            if report.problems:
                raise ValueError(f"{report.problems[0]}; see `data lint`")
            for number, measured in report.stats.items():
                stats[number][work.source] = merge(stats[number][work.source], measured)
            advance(1)
    return {
        "samples": {names[number]: describe_samples(measured) for number, measured in stats.items()},
        "plans": [describe_plan(each, ranks) for each in rows],
    }


def measured_by(rows: Rows) -> tuple:
    """Returns what the lengths and media of samples depend on."""
    layout = rows.layout
    parts = {name: part for name, part in describe_layout(layout).items() if name not in ("max_length", "too_long")}
    length = layout.max_length if layout.encoder.degrade.by_budget else None
    return (fingerprint(parts), length, *(source.name for source in rows.sources))


def name_of(alike: Sequence[Rows]) -> str:
    """Returns the name of rows that are measured as one."""
    names = ", ".join(dict.fromkeys(rows.name for rows in alike))
    layout = alike[0].layout
    return f"{names}, {layout.max_length:,} tokens" if layout.encoder.degrade.by_budget else names


def describe_samples(stats: Mapping[str, Stats]) -> dict[str, Any]:
    """Returns the distributions of each source, and of all together as `all`."""
    everything = no_stats()
    for each in stats.values():
        everything = merge(everything, each)
    groups = {**stats, "all": everything} if len(stats) > 1 else stats
    return {
        source: {
            name: {**distribution.describe(), "histogram": distribution.histogram()}
            for name, distribution in measured.items()
        }
        for source, measured in groups.items()
    }


def describe_plan(rows: Rows, ranks: int) -> dict[str, Any]:
    """Returns the simulated plan of some rows."""
    shards = [shard for source in rows.sources for shard in source.shards]
    catalog = open_catalog(
        [without_limit(source) for source in rows.sources],
        rows.layout.fingerprint,
        quarantine=rows.quarantine,
        max_bad_share=1.0,
        lost=[shard for shard in shards if not exists(shard, rows.storage)],
    )
    summaries = catalog.source_summaries()
    passes = repeats(rows.sources, summaries, rows.measure)
    plan = PlanConfig(
        max_length=rows.layout.max_length,
        rows_per_step=rows.rows_per_step,
        window_rows=rows.window_rows,
        repeats=tuple(passes),
        num_epochs=rows.num_epochs,
        cost=rows.cost,
        seed=rows.seed,
    )
    with progress(f"simulating {rows.name}, {plan.max_length} tokens", rows.num_steps) as advance:
        simulation = simulate(catalog, plan, num_steps=rows.num_steps, ranks=ranks, progress=advance)
    return {
        "name": rows.name,
        "max_length": plan.max_length,
        "rows_per_step": plan.rows_per_step,
        "num_epochs": rows.num_epochs,
        "tokens_per_tile": rows.layout.encoder.tokens_per_tile,
        "tile_size": rows.layout.encoder.tile_size,
        **describe_steps(simulation, ranks),
        "costs_in": "FLOPs" if rows.has_model else "tokens",
        "shares_of": rows.measure,
        "sources": describe_sources(catalog, simulation, rows.measure, passes),
    }


def without_limit(source: Source) -> Source:
    """Returns a source of which any share may be bad: it is looked at, not trained on."""
    return Source(**{**vars(source), "max_bad_share": 1.0})


def describe_steps(simulation: Simulation, ranks: int) -> dict[str, Any]:
    """Returns what holds for all sources together."""
    costs, imbalance = simulation.step_costs, simulation.imbalance
    return {
        "num_steps": simulation.num_steps,
        "num_rows": simulation.num_rows,
        "num_samples": int(simulation.samples.sum()),
        "num_tokens": int(simulation.tokens.sum()),
        "num_supervised_tokens": int(simulation.targets.sum()),
        "num_tiles": simulation.num_tiles,
        "fill": simulation.fill,
        "emptiest_row": simulation.worst_fill,
        "step_cost": {
            "mean": float(costs.mean()),
            "max_over_mean": float(costs.max() / costs.mean()),
            "deviation": float(costs.std() / costs.mean()),
        },
        "ranks": ranks,
        "rank_cost_max_over_mean": {
            "mean": float(imbalance.mean()),
            "p99": float(np.quantile(imbalance, 0.99)),
            "worst": float(imbalance.max()),
        },
    }


def describe_sources(
    catalog: Catalog, simulation: Simulation, measure: str, passes: Sequence[Any]
) -> dict[str, dict[str, Any]]:
    """Returns the shares, repeats and losses of each source."""
    summaries = catalog.source_summaries()
    asked = asked_shares(passes, summaries, measure)
    drawn = {"samples": simulation.samples, "tokens": simulation.tokens, "supervised_tokens": simulation.targets}
    assert drawn.keys() == MEASURES.keys()
    return {
        source.name: {
            "samples": summary.num_samples,
            "usable": summary.num_usable,
            "dropped": summary.dropped,
            "shortened": dict(zip(("samples", "turns", "tokens"), summary.shortened, strict=True)),
            "repeat": float(passes[place]),
            "times_seen": int(simulation.samples[place]) / max(1, summary.num_usable),
            "asked_share": asked[place],
            **{f"share_of_{name}": int(each[place]) / max(1, int(each.sum())) for name, each in drawn.items()},
        }
        for place, (source, summary) in enumerate(zip(catalog.sources, summaries, strict=True))
    }
