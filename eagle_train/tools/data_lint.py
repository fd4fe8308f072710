"""`python -m eagle_train data lint`: what a run would leave out of a data set, and what looks odd in it."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from eagle_train.data.catalog import Source
from eagle_train.data.images import ImageReader
from eagle_train.data.layout import Layout
from eagle_train.data.lint import Finding, TextChecks
from eagle_train.data.lint_files import Checks, ShardWork, chunks, lint_records, lint_shard
from eagle_train.data.lint_parts import LINT_VERSION, lint_parts
from eagle_train.data.lint_report import SourceReport
from eagle_train.data.storage import Storage
from eagle_train.tools.data_arguments import (
    check_keys,
    experiment_rows,
    find_sources,
    is_experiment,
    parse_values,
    plain_encoder,
    split_own,
    whole,
    yes,
)
from eagle_train.tools.stdout import stdout
from eagle_train.track.console import progress
from eagle_train.train.assemble import load_tokenizer

HELP = """Finds what a run would leave out (errors) and what looks odd (warnings), with examples and what to do.

  data lint recipe=NAME | tars=GLOB [data_root=data] [index_dir=DIR] [media_root=DIR] ...
  data lint annotation=FILE [media_root=DIR] ...
  data lint +experiment=NAME [key=value ...] [stage=NAME] ...
      the sources of a stage, by default the last, against its tokenizer, template and max_length

  tokenizer=FOLDER        its special tokens are looked for in texts
  chat_template=NAME max_length=N   with a tokenizer: text longer than N tokens is an error
  max_characters=50000    without a tokenizer: longer conversations are a warning
  decode=true             decode every image, and two frames of every video; else only headers are read
  examples=3              of each finding
  workers=1               processes
  --json                  print one JSON object

Indexes of shards are kept, so that a second look is quick. Findings are kept in ./.lint until all is looked at:
the same command goes on where it was stopped. Exit code: 1 if there are errors, else 0.
"""
KEPT = Path(".lint")
COMMON = {"tokenizer", "chat_template", "max_length", "max_characters", "decode", "examples", "workers"}
SHARD_KEYS = COMMON | {"recipe", "tars", "data_root", "index_dir", "media_root"}
FILE_KEYS = COMMON | {"annotation", "media_root"}
EXPERIMENT_KEYS = {"stage", "max_characters", "decode", "examples", "workers"}


def main(arguments: Sequence[str]) -> int:
    """Looks and prints what was found; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train data lint",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("arguments", nargs="+", help="key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_intermixed_args(arguments)
    found = look(options.arguments)
    reports = {name: report.describe() for name, report in found.items()}
    if options.json:
        print(json.dumps({"sources": reports, **totals(reports)}))
    else:
        show(reports, stdout())
    return 1 if totals(reports)["errors"] else 0


def look(arguments: Sequence[str]) -> dict[str, SourceReport]:
    """Returns what was found, by source."""
    if is_experiment(arguments):
        overrides, values = split_own(arguments, EXPERIMENT_KEYS)
        kept = kept_folder(values, overrides)
        rows = experiment_rows(overrides, values.get("stage"))[-1]
        return lint_sources(rows.sources, rows.storage, values, stage_checks(values, rows.layout), kept)
    values = parse_values(arguments)
    check_keys(values, FILE_KEYS if "annotation" in values else SHARD_KEYS)
    checks, kept = make_checks(values), kept_folder(values)
    if "annotation" in values:
        return lint_annotation(values, checks, kept)
    return lint_sources(find_sources(values), None, values, checks, kept)


def kept_folder(values: Mapping[str, str], overrides: Sequence[str] = ()) -> Path:
    """Returns where a look keeps its findings until it is done: the same for the same look."""
    same: dict[str, Any] = {name: value for name, value in values.items() if name not in ("workers", "examples")}
    if overrides:
        same["experiment"] = sorted(overrides)
    return KEPT / hashlib.sha256(json.dumps([LINT_VERSION, same], sort_keys=True).encode()).hexdigest()[:16]


def make_checks(values: Mapping[str, str]) -> Checks:
    """Returns what to check samples against.

    Raises:
        ValueError: if tokens are to be counted without a template, or a template is given for nothing.
    """
    counts = "max_length" in values
    if "chat_template" in values and not counts:
        raise ValueError(f"chat_template={values['chat_template']} is for counting tokens; give max_length= too")
    if counts and not {"tokenizer", "chat_template"} <= values.keys():
        raise ValueError(f"max_length={values['max_length']} counts tokens; give tokenizer= and chat_template= too")
    encoder = plain_encoder(values) if counts else None
    tokenizer = encoder.tokenizer if encoder else load_tokenizer(values["tokenizer"]) if "tokenizer" in values else None
    return Checks(
        texts=text_checks(values, tokenizer),
        template=encoder.template if encoder else None,
        tokenizer=tokenizer if counts else None,
        max_length=whole(values, "max_length", 1) if counts else None,
        images=ImageReader() if yes(values, "decode") else None,
    )


def stage_checks(values: Mapping[str, str], layout: Layout) -> Checks:
    """Returns what to check samples of a stage against; its images are decoded as it decodes them."""
    # Of a text that is too long, the stage may keep the turns that fit.
    drops = layout.too_long.num_answers([layout.max_length], layout.max_length) == 0
    return Checks(
        texts=text_checks(values, layout.encoder.tokenizer),
        template=layout.encoder.template,
        tokenizer=layout.encoder.tokenizer,
        max_length=layout.max_length if drops else None,
        images=layout.encoder.images if yes(values, "decode") else None,
    )


def text_checks(values: Mapping[str, str], tokenizer: Any) -> TextChecks:
    """Returns what to check texts against; the tokenizer may be None."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special] if tokenizer else ()
    return TextChecks(special_tokens=special, max_characters=whole(values, "max_characters", 50_000))


def lint_sources(
    sources: Sequence[Source], storage: Storage | None, values: Mapping[str, str], checks: Checks, kept: Path
) -> dict[str, SourceReport]:
    """Returns what was found in the shards of sources."""
    shards = [(s.name, shard, s.index_dir, s.media_root, storage) for s in sources for shard in s.shards]
    workers = whole(values, "workers", 1)
    works = [ShardWork(number, *shard) for number, shard in enumerate(shards)]
    reports = {source.name: SourceReport(whole(values, "examples", 3)) for source in sources}
    with progress("looking at shards", len(works)) as advance:
        found = lint_parts(
            lint_shard, checks, works, kept, workers=workers, num_works=len(works), progress=lambda count: advance(1)
        )
        for work, part in zip(works, found, strict=True):
            reports[work.source].add(part)
    for report in reports.values():
        report.finish()
    return reports


def lint_annotation(values: Mapping[str, str], checks: Checks, kept: Path) -> dict[str, SourceReport]:
    """Returns what was found in the records of an annotation and in their media."""
    path = Path(values["annotation"])
    if not path.is_file():
        raise ValueError(f"no file annotation={path}")
    root = Path(values["media_root"]) if "media_root" in values else None
    checks = replace(checks, media_root=root or path.parent)
    report = SourceReport(whole(values, "examples", 3))
    errors: list[str] = []
    with progress("looking at records", None) as advance:
        found = lint_parts(
            lint_records, checks, chunks(path, errors), kept, workers=whole(values, "workers", 1),
            progress=advance,
        )  # fmt: skip
        for part in found:
            report.add(part)
    for error in errors:
        report.note(path.name, Finding("unreadable_file", error))
    report.finish(root)
    return {path.name: report}


def totals(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Returns the numbers of all sources together."""
    return {name: sum(report[name] for report in reports.values()) for name in ("samples", "errors", "warnings")}


def show(reports: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Prints the findings of each source, errors first."""
    for name, report in reports.items():
        verdict = "nothing found" if not report["findings"] else ""
        console.print(f"[bold]{escape(name)}[/bold]: {report['samples']:,} samples {verdict}", highlight=False)
        for kind, found in report["findings"].items():
            style = "red" if found["level"] == "error" else "yellow"
            console.print(
                f"  [{style}]{found['level']:7} {kind}[/{style}] {found['count']:,}: {escape(found['remedy'])}",
                highlight=False,
                soft_wrap=True,
            )
            for example in found["examples"]:
                text = f"      {example['key']}: {example['excerpt']}"
                console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)
    sums = totals(reports)
    console.print(
        f"{sums['samples']:,} samples, {sums['errors']:,} errors, {sums['warnings']:,} warnings", highlight=False
    )
