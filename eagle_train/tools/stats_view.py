"""The tables of `data stats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

EIGHTHS = " ▏▎▍▌▋▊▉█"
BAR = 32
"""Characters of the longest bar."""
NAMES = {
    "image_width": "width of images",
    "image_height": "height of images",
    "image_tiles": "tiles of images",
    "video_frames": "frames of videos",
    "document_pages": "pages of documents",
}
"""Of what is measured per medium."""
COLUMNS = ["mean", "min", "p1", "p5", "p25", "p50", "p75", "p95", "p99", "max"]


def show(stats: Mapping[str, Any], console: Console) -> None:
    """Prints statistics for reading."""
    for name, groups in stats["samples"].items():
        for source, measured in groups.items():
            if source == "all" or len(groups) == 1:
                console.print(percentiles(f"{name}: {source}", measured))
                for what in ("tokens", "supervised_tokens", "image_tiles", "video_frames", "document_pages"):
                    if measured[what].get("sum"):
                        console.print(histogram(what, measured[what]["histogram"]))
        if len(groups) > 1:
            console.print(lengths_by_source(groups))
    for plan in stats["plans"]:
        show_plan(plan, console)


def percentiles(title: str, measured: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns a line per thing measured."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    table.add_column("per sample", no_wrap=True)
    for column in ["sum", *COLUMNS]:
        table.add_column(column, justify="right")
    for what, found in measured.items():
        if found.get("sum"):
            table.add_row(NAMES.get(what, what.replace("_", " ")), *(brief(found[key]) for key in ["sum", *COLUMNS]))
    return table


def lengths_by_source(groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Returns a line per source with the tokens of its samples."""
    table = Table(title="tokens of a sample, by source", title_justify="left", box=None, padding=(0, 1))
    table.add_column("source", no_wrap=True)
    for column in ("samples", *COLUMNS, "learnt", "images", "tiles"):
        table.add_column(column, justify="right")
    for source, measured in groups.items():
        found = measured["tokens"]
        if not found["count"]:
            continue
        cells = [brief(found[key]) for key in ("count", *COLUMNS)]
        learnt = f"{measured['supervised_tokens']['sum'] / found['sum']:.1%}"
        means = [f"{measured[name]['mean']:.2f}" for name in ("images", "tiles")]
        table.add_row(source, *cells, learnt, *means, style="bold" if source == "all" else None)
    return table


def histogram(title: str, bins: Sequence[tuple[int, int, int]]) -> Table:
    """Returns a bar per bin."""
    title = NAMES.get(title, f"{title.replace('_', ' ')} per sample")
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    most = max((count for _, _, count in bins), default=1)
    for first, last, count in bins:
        table.add_row(f"{first:,} - {last:,}" if first < last else f"{first:,}", bar(count / most), f"{count:,}")
    return table


def bar(share: float) -> str:
    """Returns a bar of block characters, up to `BAR` long."""
    eighths = round(share * BAR * 8)
    if share > 0:
        eighths = max(1, eighths)
    full, rest = divmod(eighths, 8)
    return "█" * full + (EIGHTHS[rest] if rest else "")


def show_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Prints a simulated plan."""
    console.print()
    epochs = f", {plan['num_epochs']} epoch(s)" if plan["num_epochs"] else ""
    cost, ranks = plan["step_cost"], plan["rank_cost_max_over_mean"]
    lines = [
        f"[bold]{escape(plan['name'])}, rows of {plan['max_length']:,} tokens[/bold], "
        f"{plan['rows_per_step']} per step{epochs}; "
        f"tiles of {plan['tile_size']} px, {plan['tokens_per_tile']} tokens each",
        f"  {plan['num_samples']:,} samples, {plan['num_tiles']:,} tiles, {plan['num_tokens']:,} tokens "
        f"({plan['num_supervised_tokens']:,} learnt) in {plan['num_rows']:,} rows, {plan['num_steps']:,} steps",
        f"  rows {plan['fill']:.2%} full, the emptiest {plan['emptiest_row']:.2%}",
        f"  cost of a step (in {plan['costs_in']}): deviation {cost['deviation']:.2%} of the mean, "
        f"the costliest {cost['max_over_mean']:.3f} of it",
        f"  busiest of {plan['ranks']} ranks over their mean: {ranks['mean']:.3f} on average, "
        f"{ranks['p99']:.3f} in the worst 1% of steps",
    ]
    if plan["rows_per_step"] % plan["ranks"]:
        lines.append(f"  {plan['rows_per_step']} rows do not go evenly to {plan['ranks']} ranks: some get an empty row")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(source_table(plan))


def source_table(plan: Mapping[str, Any]) -> Table:
    """Returns a line per source: shares asked and realized, repeats, losses."""
    table = Table(title="shares", title_justify="left", box=None, padding=(0, 1))
    table.add_column("source", no_wrap=True)
    asked = f"asked of {plan['shares_of'].replace('_', ' ')}"
    for name in ("samples", "usable", "repeat", "times seen", asked, "samples", "tokens", "learnt"):
        table.add_column(name, justify="right")
    table.add_column("dropped, shortened")
    for source, facts in plan["sources"].items():
        shares = ("asked_share", "share_of_samples", "share_of_tokens", "share_of_supervised_tokens")
        losses = [f"{reason} {count:,}" for reason, count in facts["dropped"].items()]
        if facts["shortened"]["samples"]:
            losses.append("{samples:,} shortened by {turns:,} turns, {tokens:,} tokens".format(**facts["shortened"]))
        table.add_row(
            source,
            f"{facts['samples']:,}",
            f"{facts['usable']:,}",
            f"{facts['repeat']:.4g}",
            f"{facts['times_seen']:.3f}",
            *(f"{facts[share]:.2%}" for share in shares),
            ", ".join(losses),
        )
    return table


def brief(number: float) -> str:
    """Returns a number in few characters."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(number) >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"
