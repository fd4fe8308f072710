"""What the lines of `goodput.jsonl` add up to: the seconds of a run by phase, over all its starts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASES = {
    "training": "training",
    "startup": "start-up",
    "data": "index and plan of the data",
    "resume": "loading checkpoints",
    "data_wait": "waiting for rows",
    "checkpoint": "checkpoint stall",
    "evaluation": "evaluation",
    "lost": "steps done again",
    "down": "down between starts",
    "other": "other",
}
"""Phases of a run's time, and what a reader is told. `lost` and `down` are known only afterwards."""
STEPPING = ("training", "data_wait")
"""Phases that are lost if the steps they belong to are."""


@dataclass(slots=True)
class Span:
    """Time from one checkpoint to the next, or to the end of a start."""

    start: int
    """Number of the start of the run that it belongs to."""
    first: int
    """Global step reached at its beginning, and at its end."""
    last: int
    seconds: Counter[str]
    """Of the phases in `STEPPING`."""

    def lose_after(self, step: int) -> Counter[str]:
        """Takes out and returns the seconds after global step `step`; within the span, steps share them equally."""
        if self.last < step or (self.last == step and self.first < step):
            return Counter()
        share = 1.0 if self.first >= step else (self.last - step) / (self.last - self.first)
        lost = Counter({name: value * share for name, value in self.seconds.items()})
        self.seconds.subtract(lost)
        self.last = max(min(self.last, step), self.first)
        return lost


@dataclass(slots=True)
class Timeline:
    """Seconds by phase of every start of a run."""

    starts: list[Counter[str]] = field(default_factory=list)
    begin: float = 0.0
    """When the run was first started, in seconds since 1970."""
    end: float = 0.0
    """When the last line was written. All seconds of `starts` add up to the time from `begin` to here."""
    step: int = 0
    """Global step reached."""
    spans: list[Span] = field(default_factory=list)

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes up one line."""
        if "start" in record:
            self._begin(float(record["start"]))
        elif "resumed" in record:
            self._resume(int(record["resumed"]))
        else:
            self._pass(record["seconds"], int(record["step"]))
            if record.get("saved"):
                self._new_span()

    def _begin(self, at: float) -> None:
        if self.starts:
            self.starts[-1]["down"] += max(at - self.end, 0.0)
        else:
            self.begin = at
        self.end = max(at, self.end)
        self.starts.append(Counter())
        self._new_span()

    def _new_span(self) -> None:
        self.spans.append(Span(len(self.starts) - 1, self.step, self.step, Counter()))

    def _pass(self, seconds: Mapping[str, float], step: int) -> None:
        self.starts[-1].update(seconds)
        self.end += sum(seconds.values())
        span = self.spans[-1]
        span.seconds.update({name: seconds[name] for name in STEPPING if name in seconds})
        self.step = span.last = max(step, span.first)

    def _resume(self, step: int) -> None:
        for span in self.spans:
            for name, value in span.lose_after(step).items():
                self.starts[span.start][name] -= value
                self.starts[span.start]["lost"] += value
        self.step = step
        self.spans = [span for span in self.spans if sum(span.seconds.values()) > 0]
        self._new_span()

    def totals(self) -> dict[str, float]:
        """Returns the seconds of all starts by phase, in the order of `PHASES`; those not in it are `other`."""
        total: Counter[str] = Counter()
        for seconds in self.starts:
            total.update(seconds)
        named = {name: total[name] for name in PHASES}
        return named | {"other": sum(total.values()) - sum(named.values()) + named["other"]}


def read_timeline(path: Path) -> Timeline:
    """Returns what the lines of a `goodput.jsonl` add up to; one torn by a kill is left out."""
    timeline = Timeline()
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if timeline.starts or "start" in record:  # else the line of the first start is damaged
            timeline.add(record)
    return timeline


def goodput_of(seconds: Mapping[str, float]) -> float:
    """Returns the share of training in the seconds of all phases, 0 to 1."""
    return seconds["training"] / max(sum(seconds.values()), 1e-9)


def in_words(seconds: Mapping[str, float]) -> str:
    """Returns one line: the share of training, and where the rest of the time went, the largest first."""
    total = max(sum(seconds.values()), 1e-9)
    rest = sorted(((value, name) for name, value in seconds.items() if name != "training"), reverse=True)
    parts = [f"{PHASES[name]} {value / total:.1%}" for value, name in rest if value / total >= 0.0005]
    return f"goodput {goodput_of(seconds):.1%} of {total:,.0f} s" + (f"; {', '.join(parts)}" if parts else "")
