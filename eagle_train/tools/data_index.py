"""`python -m eagle_train data index`: indexes and text lengths before a run needs them, by many processes."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eagle_train.data.catalog import Source
from eagle_train.data.index import ensure_index, index_path
from eagle_train.data.jobs import run_jobs
from eagle_train.data.layout import Layout, ensure_layout
from eagle_train.data.shards import expected_shards
from eagle_train.data.stats import text_lengths
from eagle_train.data.tables import read_table
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
from eagle_train.track.console import progress
from eagle_train.train.assemble import DataSettings
from eagle_train.train.config import build, load_choice
from eagle_train.train.stage_data import make_layout

HELP = """Builds the index of each shard: byte ranges, sizes of images and videos from their headers, and what is bad.

  data index recipe=NAME | tars=GLOB [data_root=data] [index_dir=DIR] [workers=1]
      the indexes. index_dir: where they go if the shards' folder is read only
  data index recipe=NAME | tars=GLOB tokenizer=FOLDER chat_template=NAME ...
      and the text lengths under this tokenizer and template (one of configs/chat_template)
  data index +experiment=NAME [key=value ...] [stage=NAME] [workers=1]
      and the layouts: all that the stages of a run would build when they begin

What is on disk and fits its shard is kept, so that a stopped build goes on where it was.
"""
KEYS = {"recipe", "tars", "data_root", "index_dir", "tokenizer", "chat_template", "workers"}
OWN = ("stage", "workers")
ANY_LENGTH = 1 << 30


@dataclass(frozen=True, slots=True)
class Work:
    """One shard of a source, and what to build for it."""

    source: str
    shard: Path
    index_dir: Path | None
    layout: int | None
    """Number of its layout among those that are shared; None: only the index."""


@dataclass(slots=True)
class Report:
    """What was built for a shard, or for all shards of a source."""

    shards: int = 0
    made: int = 0
    """Shards whose index was not there."""
    samples: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """By reason."""
    seconds: float = 0.0
    """Of all processes together."""
    problems: list[str] = field(default_factory=list)
    """Shards that cannot be indexed."""

    def add(self, other: Report) -> None:
        """Adds the report of another shard."""
        self.shards, self.made = self.shards + other.shards, self.made + other.made
        self.samples, self.seconds = self.samples + other.samples, self.seconds + other.seconds
        self.bad += other.bad
        self.problems += other.problems


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
        layouts = [each.layout for each in rows]
        pairs = [(source, number) for number, each in enumerate(rows) for source in each.sources]
    else:
        values = parse_values(arguments)
        check_keys(values, KEYS)
        layouts = text_only(values) if {"tokenizer", "chat_template"} & values.keys() else []
        pairs = [(source, 0 if layouts else None) for source in find_sources(values)]
    started = time.perf_counter()
    # A text-only layout has no row: nothing is laid out, only counted.
    reports = build_all(pairs, (layouts, is_experiment(arguments)), whole(values, "workers", 1))
    show(reports, time.perf_counter() - started, Console())
    problems = [problem for report in reports.values() for problem in report.problems]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def text_only(values: dict[str, str]) -> list[Layout]:
    """Returns the layout that has the tokenizer and template of a run, to count text with."""
    data: DataSettings = build(load_choice("data", "default"))
    return [make_layout(plain_encoder(values), ANY_LENGTH, data.too_long)]


def build_all(
    pairs: Sequence[tuple[Source, int | None]], shared: tuple[Sequence[Layout], bool], workers: int
) -> dict[str, Report]:
    """Builds what is missing of all sources; returns reports by source, a shard counted once for all stages."""
    works = [Work(s.name, shard, s.index_dir, layout) for s, layout in pairs for shard in s.shards]
    reports: dict[str, Report] = {source.name: Report() for source, _ in pairs}
    seen: set[Path] = set()
    with progress("indexing", len(works)) as advance:
        for work, report in run_jobs(build_one, shared, works, workers):
            if work.shard in seen:  # for another stage
                report.shards = report.samples = 0
                report.bad.clear()
                report.problems.clear()
            seen.add(work.shard)
            reports[work.source].add(report)
            advance(1)
    return reports


def build_one(shared: tuple[Sequence[Layout], bool], work: Work) -> Report:
    """Builds what is missing of one shard."""
    layouts, lay_out = shared
    started = time.perf_counter()
    path = index_path(work.shard, work.index_dir)
    before = path.stat().st_mtime_ns if path.is_file() else None
    try:
        if not work.shard.exists():
            count = expected_shards(work.shard.parent).get(work.shard.name, 1)
            return Report(1, 0, count, Counter(missing_shard=count), problems=[f"{work.shard} is not there"])
        reasons = read_table(ensure_index(work.shard, work.index_dir))["reason"].to_pylist()
        made = path.stat().st_mtime_ns != before
        if work.layout is not None and lay_out:
            table = read_table(ensure_layout(work.shard, work.index_dir, work.source, layouts[work.layout]))
            reasons = table["reason"].to_pylist()
        elif work.layout is not None:
            text_lengths(work.shard, work.index_dir, layouts[work.layout])
    except PermissionError as error:
        raise ValueError(f"{path} cannot be written ({error}); give index_dir=DIR") from error
    except (ValueError, OSError) as error:  # one bad shard does not keep the others from being indexed
        return Report(1, problems=[f"{work.shard}: {error}"])
    bad = Counter(reason for reason in reasons if reason is not None)
    return Report(1, int(made), len(reasons), bad, time.perf_counter() - started)


def show(reports: dict[str, Report], seconds: float, console: Console) -> None:
    """Prints a line per source, and their sum."""
    table = Table(title="indexes", title_justify="left")
    table.add_column("source", no_wrap=True)
    for name in ("shards", "made", "samples", "bad", "seconds", "samples/s"):
        table.add_column(name, justify="right")
    table.add_column("bad by reason")
    total = Report()
    for name, report in reports.items():
        total.add(report)
        table.add_row(*cells(name, report))
    if len(reports) > 1:
        table.add_section()
        table.add_row(*cells("all", total), style="bold")
    console.print(table)
    console.print(
        f"{total.samples:,} samples in {seconds:.1f} s; seconds in the table are of all workers together",
        highlight=False,
    )


def cells(name: str, report: Report) -> list[str]:
    """Returns the cells of one line."""
    speed = f"{report.samples / report.seconds:,.0f}" if report.seconds > 0 else ""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(report.bad.items()))
    counts = [f"{n:,}" for n in (report.shards, report.made, report.samples, report.bad.total())]
    return [name, *counts, f"{report.seconds:.1f}", speed, reasons]
