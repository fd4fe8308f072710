"""The charts of a run: which metrics are drawn together, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eagle_train.track.charts import Chart, Line, Point, line_chart, smooth

WIDE, NARROW = (1120, 300), (550, 230)
"""(width, height) of a chart that takes the whole page and of one that takes half, in pixels."""
NUM_COLORS = 8
"""Colours of the stylesheet's palette."""
SMOOTH_SHARE = 0.03
"""Share of a run that one point of a smoothed line is the mean of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """The charts of a run; None where nothing was logged."""

    training: list[Chart | None]
    throughput: list[Chart | None]


def make_curves(records: Sequence[dict[str, Any]]) -> Curves:
    """Returns the charts of a run's training records, ordered by step."""
    stages = stage_spans(records)
    span = max(1.0, SMOOTH_SHARE * len(records))

    def chart(title: str, lines: Sequence[Line], size: tuple[int, int] = NARROW, **options: Any) -> Chart | None:
        return line_chart(title, lines, stages, width=size[0], height=size[1], **options)

    def plain(*named: tuple[str, str], scale: float = 1.0) -> list[Line]:
        return [
            Line(name=label, stretches=series(records, name, scale), color=i) for i, (label, name) in enumerate(named)
        ]

    loss = series(records, "train/loss")
    norms = series(records, "train/grad_norm")
    memory = [(short, f"memory/peak_{short}_gib") for short in ("cuda", "rss")]
    return Curves(
        training=[
            chart(
                "Training loss",
                [
                    Line(name="logged", stretches=loss, style="raw"),
                    Line(name="smoothed", stretches=smoothed(loss, span)),
                ],
                WIDE,
            ),
            chart("Loss by source", by_suffix(records, "train/loss/", span), WIDE, note="smoothed"),
            chart("Learning rate", merged(by_suffix(records, "lr/", 1.0)), from_zero=True),
            chart(
                "Gradient norm",
                [
                    Line(name="logged", stretches=norms, style="raw", color=2),
                    Line(name="smoothed", stretches=smoothed(norms, span), color=2),
                ],
            ),
        ],
        throughput=[
            chart(
                "Tokens per second",
                plain(("all", "time/tokens_per_second"), ("with loss", "time/supervised_tokens_per_second")),
                from_zero=True,
            ),
            chart(
                "Use of the devices' peak",
                plain(("MFU", "perf/mfu"), ("HFU", "perf/hfu"), scale=100.0),
                unit="%",
                from_zero=True,
            ),
            chart("Image tiles per second", plain(("tiles", "time/images_per_second")), from_zero=True),
            chart(
                "Waiting for data",
                plain(("share of step time", "time/data_wait_share"), scale=100.0),
                unit="%",
                from_zero=True,
            ),
            chart("Step time", plain(("seconds", "time/step_seconds")), unit=" s", from_zero=True),
            chart("Packing fill", plain(("tokens / room in rows", "data/fill"), scale=100.0), unit="%"),
            chart("Peak memory of rank 0", plain(*memory), unit=" GiB", from_zero=True),
        ],
    )


FRAMES = re.compile(r"eval_frames_(\d+)/exact_match/(.+)")
"""Metrics of questions about videos asked with at most so many frames."""


def frames_chart(scores: Mapping[str, float]) -> Chart | None:
    """Returns the accuracy over the number of frames, a line per question type; None if it was not evaluated."""
    by_type: dict[str, list[Point]] = {}
    for name, value in scores.items():
        if match := FRAMES.fullmatch(name):
            by_type.setdefault(match[2], []).append((int(match[1]), 100 * value))
    by_type.pop("simple", None)  # an average over other types than the headline's
    if not by_type:
        return None
    lines = [
        Line(name=kind, stretches=[sorted(points)], color=i % NUM_COLORS)
        for i, (kind, points) in enumerate(sorted(by_type.items()))
    ]
    counts = [x for points in by_type.values() for x, _ in points]
    span = [("", min(counts), max(counts))]
    note = "at most so many frames of each video"
    options = {"width": WIDE[0], "height": WIDE[1], "unit": "%", "from_zero": True, "x": "frame"}
    return line_chart("Accuracy by number of frames", lines, span, note=note, **options)


def stage_spans(records: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Returns (name, first step, last step) of the stages in order; a stage begins where the one before ends."""
    spans: list[tuple[str, float, float]] = []
    for record in records:
        name = str(record.get("stage", ""))
        if spans and spans[-1][0] == name:
            spans[-1] = (name, spans[-1][1], record["step"])
        else:
            spans.append((name, spans[-1][2] if spans else 0, record["step"]))
    return spans


def series(records: Sequence[dict[str, Any]], name: str, scale: float = 1.0) -> list[list[Point]]:
    """Returns the points of a metric, a stretch per stage; a value that is missing or not finite is left out."""
    stretches: list[list[Point]] = []
    stage = None
    for record in records:
        if record.get("stage") != stage or not stretches:
            stage = record.get("stage")
            stretches.append([])
        if record.get(name) is not None:
            stretches[-1].append((record["step"], record[name] * scale))
    return [stretch for stretch in stretches if stretch]


def smoothed(stretches: Sequence[Sequence[Point]], span: float) -> list[list[Point]]:
    """Returns each stretch smoothed by itself: stages differ in data and loss."""
    return [smooth(stretch, span) for stretch in stretches]


def by_suffix(records: Sequence[dict[str, Any]], prefix: str, span: float) -> list[Line]:
    """Returns a line per metric that begins with `prefix`, in order of appearance, named by the rest.

    Args:
        span: that each is smoothed over; 1 leaves it as it is. A source that is in few steps has few points, so
            its share of `span` is smaller.
    """
    names = list(dict.fromkeys(name for record in records for name in record if name.startswith(prefix)))
    lines = []
    for i, name in enumerate(names):
        found = series(records, name)
        own_span = span * sum(map(len, found)) / len(records)
        stretches = smoothed(found, max(1.0, own_span))
        dashes = i // NUM_COLORS
        style = f"dash{min(dashes - 1, 2)}" if dashes else ""
        lines.append(Line(name=name.removeprefix(prefix), stretches=stretches, color=i % NUM_COLORS, style=style))
    return lines


def merged(lines: Sequence[Line]) -> list[Line]:
    """Returns the lines with equal ones as one under all their names; one that covers another is dashed."""
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(map(tuple, line.stretches)), []).append(line)
    result = []
    for i, same in enumerate(groups.values()):
        first = same[0]
        names = ", ".join(line.name for line in same)
        style = f"dash{min(i - 1, 2)}" if i else ""
        result.append(Line(name=names, stretches=first.stretches, color=first.color, style=style))
    return result
