"""`python -m eagle_train data index`: indexes and text lengths before a run needs them, by many processes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from eagle_train.data.index_jobs import Report, Wanted, Work, build_shard, make_works
from eagle_train.data.layout import Layout
from eagle_train.data.work_pool import run_all
from eagle_train.tools.data_arguments import (
    check_keys,
    experiment_rows,
    find_sources,
    is_experiment,
    parse_values,
    plain_encoder,
    split_own,
    whole,
)
from eagle_train.tools.stdout import stdout
from eagle_train.track.console import progress
from eagle_train.train.assemble import DataSettings
from eagle_train.train.config import build, load_choice
from eagle_train.train.stage_data import make_layout

HELP = """Builds the index of each shard: byte ranges, sizes of images and videos from their headers, and what is bad.

  data index recipe=NAME | tars=GLOB [data_root=data] [index_dir=DIR] [workers=1]
      the indexes. index_dir: where they go if the shards' folder is read only; media_root: folder of files that
      records name beside the members of their tars
  data index recipe=NAME | tars=GLOB tokenizer=FOLDER chat_template=NAME ...
      and the text lengths under this tokenizer and template (one of configs/chat_template)
  data index +experiment=NAME [key=value ...] [stage=NAME] [workers=1]
      and the layouts: all that the stages of a run would build when they begin

What is on disk and fits its shard is kept, so that a stopped build goes on where it was.
"""
KEYS = {"recipe", "tars", "data_root", "index_dir", "media_root", "tokenizer", "chat_template", "workers"}
OWN = ("stage", "workers")
ANY_LENGTH = 1 << 30


def main(arguments: Sequence[str]) -> int:
    """Builds what is missing and prints a table; returns the exit code, 1 if a shard cannot be indexed."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train data index",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("arguments", nargs="+", help="key=value")
    arguments = parser.parse_args(arguments).arguments
    if is_experiment(arguments):
        overrides, values = split_own(arguments, OWN)
        rows = experiment_rows(overrides, values.get("stage"))
        works = make_works([each.sources for each in rows])
        wanted = Wanted(layouts=[each.layout for each in rows], storage=rows[0].storage)
    else:
        values = parse_values(arguments)
        check_keys(values, KEYS)
        layouts = text_only(values) if {"tokenizer", "chat_template"} & values.keys() else []
        works = make_works([find_sources(values)], laid_out=bool(layouts))
        wanted = Wanted(layouts=layouts, text_only=True)
    started = time.perf_counter()
    reports = build_all(works, wanted, whole(values, "workers", 1))
    show(reports, time.perf_counter() - started, stdout())
    problems = [problem for report in reports.values() for problem in report.problems]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def text_only(values: dict[str, str]) -> list[Layout]:
    """Returns the layout that has the tokenizer and template of a run, to count text with."""
    data: DataSettings = build(load_choice("data", "default"))
    return [make_layout(plain_encoder(values), ANY_LENGTH, data.too_long)]


def build_all(works: Sequence[Work], wanted: Wanted, workers: int) -> dict[str, Report]:
    """Builds what is missing of all shards; returns a report by source."""
    reports: dict[str, Report] = {work.source: Report() for work in works}
    with progress("indexing", len(works)) as advance:
        for work, report in run_all(partial(build_shard, wanted), works, workers, len(works)):
            reports[work.source].add(report)
            advance(1)
    return reports


def show(reports: dict[str, Report], seconds: float, console: Console) -> None:
    """Prints a line per source, and their sum."""
    table = Table(title="indexes", title_justify="left")
    table.add_column("source", no_wrap=True)
    for name in ("shards", "made", "samples", "bad", "seconds", "samples/s"):
        table.add_column(name, justify="right")
    total = Report()
    for name, report in reports.items():
        total.add(report)
        table.add_row(*cells(name, report))
    if len(reports) > 1:
        table.add_section()
        table.add_row(*cells("all", total), style="bold")
    console.print(table)
    for name, report in reports.items():
        if report.bad:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.bad.items()))
            console.print(f"bad in {name}: {reasons}", style="yellow", highlight=False)
    console.print(
        f"{total.samples:,} samples in {seconds:.1f} s; seconds in the table are of all workers together",
        highlight=False,
    )


def cells(name: str, report: Report) -> list[str]:
    """Returns the cells of one line."""
    speed = f"{report.samples / report.seconds:,.0f}" if report.seconds > 0 else ""
    counts = [f"{n:,}" for n in (report.shards, report.made, report.samples, report.bad.total())]
    return [name, *counts, f"{report.seconds:.1f}", speed]
