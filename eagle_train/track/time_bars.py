"""Where the time of a run went, as bars for the report: one per start, and one for the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from eagle_train.track.timeline import PHASES, Timeline

MAX_STARTS = 30
"""Starts that are drawn; of more, the last ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a bar."""

    phase: str
    """Key of `PHASES`; the stylesheet has a colour for each."""
    title: str
    percent: float
    """Of the longest bar, 0 to 100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One start of the run, or all."""

    name: str
    duration: str
    pieces: list[Piece]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A phase's part of all the time."""

    phase: str
    name: str
    duration: str
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeBars:
    """All that the template needs."""

    bars: list[Bar]
    shares: list[Share]


def time_bars(timeline: Timeline) -> TimeBars | None:
    """Returns the bars of a run, None if it has told nothing about its time."""
    totals = timeline.totals()
    whole = sum(totals.values())
    if whole <= 0:
        return None
    numbered = list(enumerate(timeline.starts, start=1))[-MAX_STARTS:]
    bars = [bar("all starts", totals, whole)]
    if len(timeline.starts) > 1:
        bars += [bar(f"start {number}", seconds, whole) for number, seconds in numbered]
    shares = [
        Share(phase=phase, name=PHASES[phase], duration=duration(seconds), share=seconds / whole)
        for phase, seconds in totals.items()
        if seconds > 0
    ]
    return TimeBars(bars=bars, shares=shares)


def bar(name: str, seconds: Mapping[str, float], whole: float) -> Bar:
    """Returns the bar of some seconds by phase; `whole` seconds fill the width."""
    pieces = [
        Piece(phase=phase, title=f"{label}: {duration(seconds[phase])}", percent=round(100 * seconds[phase] / whole, 3))
        for phase, label in PHASES.items()
        if seconds.get(phase, 0.0) > 0
    ]
    return Bar(name=name, duration=duration(sum(seconds.values())), pieces=pieces)


def duration(seconds: float) -> str:
    """Returns seconds as `h:mm:ss`, with a decimal below a minute."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
