"""Geometry of line charts: from points in data units to paths and ticks in pixels, for the report's template.

No drawing library: the template writes the SVG, so that its colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Point = tuple[float, float]
"""(step, value)."""

MAX_POINTS = 500
"""Of one line's stretch; more would be closer together than pixels."""
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 27, 26
"""Pixels around the plot: for the labels of y, nothing, the names of stages, the labels of x."""
LOG_RATIO = 25.0
"""Largest over smallest value from which a logarithmic axis shows more than a linear one."""
MAX_DECADES = 8
"""Ticks of a logarithmic axis; of more powers of ten, every second or third has one."""
FLAT = 1e-8
"""Share of a value that the rounding of means may reach; an axis does not show what is less."""
LETTER = 6.6
"""Pixels of one letter of a label, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart, in stretches that are not joined (the stages of a run)."""

    name: str
    stretches: Sequence[Sequence[Point]]
    color: int = 0
    """Number of the colour in the stylesheet's palette."""
    style: str = ""
    """Further classes of the path: `raw` (faint) or `dash0`, `dash1`, `dash2`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """A label of an axis and its place in pixels."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """The part of the x axis that belongs to one stage, in pixels."""

    name: str
    x: float
    width: float
    label_y: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """A line as SVG: a path for what is joined, circles for points that stand alone."""

    d: str
    css: str
    dots: list[Point]


@dataclass(frozen=True, kw_only=True, slots=True)
class Legend:
    """Entry of a legend, with the line's last value."""

    name: str
    css: str
    last: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """All that the template needs to draw one chart."""

    title: str
    note: str
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    """Edges of the plot, in pixels."""
    paths: list[Path]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bands: list[Band]
    legend: list[Legend]
    hover: dict
    """For the pointer: `left`, `right` in pixels, `x0`, `x1` in what `x` says, and the points of each line."""


def line_chart(
    title: str,
    lines: Sequence[Line],
    stages: Sequence[tuple[str, float, float]],
    *,
    width: int,
    height: int,
    note: str = "",
    unit: str = "",
    from_zero: bool = False,
    x: str = "step",
) -> Chart | None:
    """Returns a chart of `lines` over the steps of `stages`, or None if they hold no point.

    Args:
        stages: name, first and last step of each.
        width, height: of the drawing, in pixels.
        note: said beside the title.
        unit: written after values.
        from_zero: whether the y axis begins at 0; if not, it is logarithmic where that shows more.
        x: what the x axis counts, in the singular.
    """
    size = -(-max((len(s) for line in lines for s in line.stretches), default=0) // MAX_POINTS)
    if size == 0:
        return None
    thinned = [replace(line, stretches=[thin(s, size) for s in line.stretches if s]) for line in lines]
    values = [y for line in thinned for stretch in line.stretches for _, y in stretch]
    log = not from_zero and min(values) > 0 and max(values) / min(values) > LOG_RATIO
    low, high, marks = y_axis(0.0 if from_zero else min(values), max(values), log)
    x0, x1 = min(start for _, start, _ in stages), max(end for _, _, end in stages)
    x1 = max(x1, x0 + 1)
    right, bottom = width - RIGHT, height - BOTTOM

    def x_px(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (right - LEFT), 1)

    def y_px(y: float) -> float:
        first, last, here = map(math.log, (low, high, y)) if log else (low, high, y)
        share = (here - first) / (last - first)
        return round(bottom - share * (bottom - TOP), 1)

    named = [line for line in thinned if line.style != "raw" and line.stretches]
    return Chart(
        title=title,
        note=f"{note}, log scale".lstrip(", ") if log else note,
        width=width,
        height=height,
        left=LEFT,
        right=right,
        top=TOP,
        bottom=bottom,
        paths=[_path(line, x_px, y_px) for line in thinned],
        x_ticks=[Tick(at=x_px(x), label=short(x)) for x in nice_ticks(x0, x1, max(3, width // 110)) if x0 <= x <= x1],
        y_ticks=[Tick(at=y_px(y), label=short(y, digits_apart(marks, log)) + unit) for y in marks],
        bands=_bands(stages, x_px),
        legend=[Legend(name=n.name, css=_css(n), last=short(n.stretches[-1][-1][1]) + unit) for n in named],
        hover={"x": x, "x0": x0, "x1": x1, "left": LEFT, "right": right, "unit": unit}
        | {"lines": [*map(_hover_line, named)]},
    )


def _hover_line(line: Line) -> dict:
    points = [[x, float(f"{y:.4g}")] for stretch in line.stretches for x, y in stretch]
    return {"name": line.name, "css": _css(line), "points": points}


def _css(line: Line) -> str:
    return f"c{line.color} {line.style}".strip()


def _path(line: Line, x_px: Callable[[float], float], y_px: Callable[[float], float]) -> Path:
    pixels = [[(x_px(x), y_px(y)) for x, y in stretch] for stretch in line.stretches]
    joined = ["L".join(f"{x:g} {y:g}" for x, y in stretch) for stretch in pixels if len(stretch) > 1]
    return Path(d="".join("M" + part for part in joined), css=_css(line), dots=[s[0] for s in pixels if len(s) == 1])


def _bands(stages: Sequence[tuple[str, float, float]], x_px: Callable[[float], float]) -> list[Band]:
    """Returns the bands of the stages; a name wider than its band stands a line higher, over the next border."""
    bands = []
    for name, start, end in stages:
        x, width = x_px(start), x_px(end) - x_px(start)
        tight = (len(name) + 1) * LETTER > width
        bands.append(Band(name=name, x=x, width=round(width, 1), label_y=TOP - (16 if tight else 5)))
    return bands


def thin(points: Sequence[Point], size: int) -> list[Point]:
    """Returns the mean of each run of `size` neighbours, so that noise looks the same all along a line."""
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smooth(points: Sequence[Point], span: float) -> list[Point]:
    """Returns the points with each value replaced by the mean of the `span` around it, fewer at the ends.

    Centred, because an average over the past alone lies above a falling curve.
    """
    half = int(span / 2)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    result = []
    for i, (x, _) in enumerate(points):
        first, last = max(0, i - half), min(len(points), i + half + 1)
        result.append((x, (sums[last] - sums[first]) / (last - first)))
    return result


def y_axis(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    """Returns the ends of an axis that holds `low` to `high`, and its ticks."""
    if log:
        low, high = low / 1.1, high * 1.1
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        marks = [10.0**k for k in range(first, last + 1, 1 + (last - first) // MAX_DECADES)]
        if sum(low <= mark <= high for mark in marks) <= 2:
            marks = [mark * factor for mark in marks for factor in (1, 2, 5)]
        return low, high, [mark for mark in marks if low <= mark <= high]
    largest = max(abs(low), abs(high))
    if largest == 0:
        low, high = 0.0, 1.0
    elif high - low <= FLAT * largest:  # the last bits of a mean: no ticks lie between them
        low, high = low - 0.05 * largest, high + 0.05 * largest
    marks = nice_ticks(low, high, 5)
    return marks[0], marks[-1], marks


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about `count` multiples of 1, 2 or 5 times a power of ten; they enclose `low` to `high`."""
    rough = (high - low) / max(count, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def digits_apart(marks: Sequence[float], log: bool) -> int:
    """Returns how many digits of an axis' ticks tell them apart: 99.85 and 99.9 need four."""
    if log or len(marks) < 2:
        return 3
    largest, step = max(map(abs, marks)), (marks[-1] - marks[0]) / (len(marks) - 1)
    return 1 + math.floor(math.log10(largest)) - math.floor(math.log10(step) + 1e-9)


def short(value: float, digits: int = 3) -> str:
    """Returns a number in at most four digits: `1.2k`, `35M`, `0.012`, `3e-05`.

    Args:
        digits: that are kept at least, more where a label needs them.
    """
    digits = max(3, digits)
    kept = max(4, digits) if 1000 <= abs(value) < 1e4 else digits
    value = float(f"{value:.{kept}g}")  # before a letter is chosen: 999,999 is 1M, not 1e+03k
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if letter == "k" else limit
            return f"{value / scale:.{digits}g}{letter}"
    return f"{value:.{max(4, digits)}g}" if abs(value) >= 1000 else f"{value:.{digits}g}"
