"""`python -m eagle_train data preview +experiment=NAME`: one HTML page of packed rows, as the model gets them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from eagle_train.data.loader import RowDataset
from eagle_train.data.stream import find_row, steps
from eagle_train.model.describe import describe
from eagle_train.tools.data_arguments import pick_stages
from eagle_train.tools.pages import write_page
from eagle_train.tools.preview_rows import RowView, view_rows
from eagle_train.track.console import progress
from eagle_train.train.assemble import build_encoder, build_schedule, trained_meta_model
from eagle_train.train.config import build, load_config
from eagle_train.train.costs import forward_flops
from eagle_train.train.stage_data import StageData, build_stage_data, fingerprint
from eagle_train.types import SampleError

MAX_BAD = 20
"""Bad samples that are listed of each source and reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Samples that the plan leaves out for one reason."""

    source: str
    reason: str
    count: int
    examples: tuple[SampleError, ...]


def main(arguments: Sequence[str]) -> int:
    """Writes the page and prints its path; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train data preview",
        description="Writes one self-contained HTML page of packed rows of a run's real plan: tokens, images as the "
        "model gets them, which tokens are learnt, and what was left out. Needs neither weights nor a GPU. Missing "
        "indexes are built first, and kept, by data.index_workers processes.",
    )
    parser.add_argument("overrides", nargs="+", help="+experiment=NAME and key=value, as for training")
    parser.add_argument("--stage", help="default: the last one")
    parser.add_argument("--rows", type=int, default=8, help="number of rows")
    parser.add_argument("--first", type=int, default=0, help="number of the first row in the stage")
    parser.add_argument("--out", type=Path, default=Path("preview.html"), help="the HTML file")
    options = parser.parse_intermixed_args(arguments)
    if options.rows < 1 or options.first < 0:
        raise ValueError(f"--rows {options.rows} is at least 1, --first {options.first} at least 0")
    print(write_preview(options.overrides, options.stage, options.first, options.rows, options.out))
    return 0


def write_preview(overrides: Sequence[str], stage: str | None, first: int, count: int, out: Path) -> Path:
    """Writes the page of `count` rows from row `first` of a stage on; returns its path.

    Raises:
        ValueError: if the stage has no such row.
    """
    config = load_config(overrides)
    model = trained_meta_model(config)
    flops = forward_flops(model, describe(model.mixture, config["data"]["tile_size"]))
    name, chosen = list(pick_stages(build_schedule(config), stage).items())[-1]
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    # Rows do not depend on the number of steps, and need not be counted.
    endless = replace(chosen, num_steps=1, num_epochs=None, tokens_per_step=None)
    data = build_stage_data(config, endless, encoder, flops, any_share=True)
    dataset = RowDataset(data.catalog, data.encoder, build(config["data"]).storage)
    plan = replace(data.plan, num_epochs=chosen.num_epochs)
    number = first // plan.rows_per_step
    with progress("planning rows", number * plan.rows_per_step) as advance:
        cursor = find_row(data.catalog, plan, number * plan.rows_per_step, advance)
    stream = steps(data.catalog, plan, first=number, cursor=cursor)
    rows = []
    with progress("decoding rows", count) as advance:
        for row in view_rows(dataset, stream, first, count, plan.max_length):
            rows.append(row)
            advance(1)
    dataset.close()
    if not rows:
        raise ValueError(f"stage {name} has no row {first}")
    return write_page(
        out,
        "preview.html.jinja",
        name=config["name"],
        stage=name,
        recipe=chosen.recipe,
        rows=rows,
        colours=colours(rows),
        left_out=left_out(data),
        fingerprint=fingerprint(data.identity),
        tokens_per_tile=data.encoder.tokens_per_tile,
        tile_size=data.encoder.tile_size,
    )


def colours(rows: Sequence[RowView]) -> Mapping[str, str]:
    """Returns the colour class of each source."""
    sources = sorted({sample.source for row in rows for sample in row.samples})
    return {source: f"c{number % 8}" for number, source in enumerate(sources)}


def left_out(data: StageData) -> list[LeftOut]:
    """Returns the samples that the plan leaves out, by source and reason, with the first ones of each."""
    found = []
    for number, (source, reasons) in enumerate(data.catalog.dropped().items()):
        errors = [error for _, error in islice(data.catalog.errors(number), 50 * MAX_BAD)]
        for reason, count in reasons.items():
            examples = tuple(error for error in errors if error.reason == reason)[:MAX_BAD]
            found.append(LeftOut(source=source, reason=reason, count=count, examples=examples))
    return found
