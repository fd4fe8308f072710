"""Progress on the terminal: a live bar where someone watches, plain lines in a log file.

Everything goes to stderr, so that the output of a tool can be piped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from eagle_train import dist
from eagle_train.track.tracker import Metrics


class ConsoleTracker:
    """Shows a run's progress.

    On a terminal, a bar per stage that is up only while the stage runs, so that other progress can be shown between
    stages. Elsewhere (a SLURM log, CI) a line per log call, at most one in `every_seconds`, and always the first and
    the last of a stage.

    Args:
        console: where to; None is stderr.
        every_seconds: between lines where there is no terminal.
        clock: gives seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._every_seconds = every_seconds
        self._clock = clock
        self._last_line: float | None = None
        self._stage, self._num_steps = "", 0
        self._bar: Progress | None = None

    def begin_stage(self, stage: str, step: int, num_steps: int) -> None:
        """Begins a bar at `step` of `num_steps`, or makes the next line due."""
        self.close()
        self._stage, self._num_steps, self._last_line = stage, num_steps, None
        if self._console.is_interactive:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                console=self._console,
                expand=True,
            )
            self._bar.start()
            self._bar.add_task(stage, total=num_steps, completed=step, facts="")

    def log(self, metrics: Metrics, step: int) -> None:
        """Shows a training record (one with `train/loss`), or the scores of an evaluation as a table."""
        if "train/loss" in metrics:
            self._show_step(metrics, int(metrics.get("stage_step", step)), step)
        if any(name.startswith("eval/exact_match/") for name in metrics):
            self._console.print(scores_table(metrics))

    def _show_step(self, metrics: Metrics, stage_step: int, step: int) -> None:
        done = stage_step >= self._num_steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=stage_step, facts=" ".join(describe(metrics)))
            if done:
                self.close()
            return
        now = self._clock()
        if done or self._last_line is None or now - self._last_line >= self._every_seconds:
            self._last_line = now
            place = f"{self._stage} {stage_step}/{self._num_steps} (step {step})"
            self._console.print("  ".join([place, *describe(metrics)]), soft_wrap=True, highlight=False, markup=False)

    def close(self, *, failed: bool = False) -> None:
        """Takes the bar down; its last state stays on the terminal."""
        del failed
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(metrics: Metrics) -> list[str]:
    """Returns the few numbers of a training record that are worth watching, those present, as short texts."""
    rates = [float(value) for name, value in metrics.items() if name.startswith("lr/")]
    parts = [f"loss {metrics['train/loss']:.4f}"]
    if rates:
        parts.append(f"lr {max(rates):.2e}")
    if "time/tokens_per_second" in metrics:
        parts.append(f"{metrics['time/tokens_per_second']:,.0f} tok/s")
    if "time/data_wait_share" in metrics:
        parts.append(f"wait {metrics['time/data_wait_share']:.0%}")
    if "time/eta_seconds" in metrics:
        parts.append(f"eta {timedelta(seconds=round(float(metrics['time/eta_seconds'])))}")
    return parts


def scores_table(metrics: Metrics) -> Table:
    """Returns exact match by question type: with the images, with grey ones, and by chance."""
    columns = {"eval": "model", "eval_grey": "grey images", "eval_chance": "chance"}
    table = Table(title="held-out exact match")
    table.add_column("question type")
    for title in columns.values():
        table.add_column(title, justify="right")
    for name in metrics:
        prefix, _, kind = name.partition("/exact_match/")
        if prefix == "eval":
            values = [metrics.get(f"{column}/exact_match/{kind}") for column in columns]
            table.add_row(kind, *("" if value is None else f"{value:.1%}" for value in values))
    return table


@contextmanager
def progress(
    description: str,
    total: int | None,
    *,
    console: Console | None = None,
    every_seconds: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a loop on rank 0; gives the function to call with the number of items just done.

    Args:
        description: what is done, for example `reading indexes`.
        total: number of items; None if unknown.
        console: where to; None is stderr.
        every_seconds: between lines where there is no terminal; a last line is always written.
        clock: gives seconds.
    """
    console = console or Console(stderr=True)
    if dist.rank() != 0:
        yield lambda count: None
    elif console.is_interactive:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(description, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        lines = _Lines(description, total, console, every_seconds, clock)
        yield lines.advance
        lines.end()


class _Lines:
    """Progress as plain lines, at most one in `every_seconds`."""

    def __init__(
        self, description: str, total: int | None, console: Console, every_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._description, self._total, self._console = description, total, console
        self._every_seconds, self._clock = every_seconds, clock
        self._started = self._last = clock()
        self._done = 0
        self._told: int | None = None

    def advance(self, count: int) -> None:
        self._done += count
        if self._clock() - self._last >= self._every_seconds:
            self.write()

    def end(self) -> None:
        if self._told != self._done:
            self.write()

    def write(self) -> None:
        self._last, self._told = self._clock(), self._done
        seconds = self._last - self._started
        total = "" if self._total is None else f"/{self._total}"
        line = f"{self._description}: {self._done}{total} in {seconds:.1f} s"
        if self._total is not None and 0 < self._done < self._total:
            left = round(seconds / self._done * (self._total - self._done))
            line += f", {timedelta(seconds=left)} left"
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)
