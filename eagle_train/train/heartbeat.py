"""What a rank is doing, told at every turn of the loop at the price of an assignment."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Beat:
    """One thing that a rank began to do."""

    phase: str = "start"
    """`start`, `data`, `agree`, `row`, `update`, `log`, `save` or `evaluate`."""
    step: int = 0
    """Global step that is being made, from 0."""
    keys: Sequence[str] = ()
    """Of the samples it is about."""
    number: int = 0
    """Of this beat. All ranks do the same things in the same order: who has the lowest number is behind."""
    since: float = field(default_factory=time.monotonic)
    """When it began, seconds."""
    first: bool = True
    """Whether the first step of a stage is not done: things are compiled and caches filled."""


@dataclass
class Heart:
    """Holds the newest beat of this rank. Another thread reads it, so it is replaced and never changed."""

    now: Beat = field(default_factory=Beat)
    data_keys: Callable[[], Sequence[str]] = tuple
    """Returns the keys of the samples that the loader is asked for."""

    def beat(self, phase: str, step: int, keys: Sequence[str] = ()) -> None:
        """Tells what begins."""
        last = self.now
        first = phase == "start" or (last.first and not (phase == "data" and last.phase != "start"))
        self.now = Beat(phase, step, keys, last.number + 1, first=first)

    def keys(self) -> Sequence[str]:
        """Returns the keys of the samples that the rank is at."""
        now = self.now
        return self.data_keys() if now.phase == "data" else now.keys
