"""Which checkpoints of a run are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """Keeps the checkpoints at which a metric of the run's log was best.

    Args:
        metric: its name, for example `train/loss`.
        count: how many are kept.
        highest: whether high is good.
    """

    metric: str
    count: int = 1
    highest: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"keep_best.count is {self.count}; keep at least 1, or set keep_best=null")

    def choose(self, steps: Sequence[int], records: Iterable[Mapping[str, Any]]) -> set[int]:
        """Returns the best of `steps`; of equal ones, the later. A step without a value of its own is none of them.

        Args:
            steps: global steps of the checkpoints, ascending.
            records: of the metrics file. The last one with the metric since the checkpoint before counts.
        """
        values: dict[int, float] = {}
        for record in records:
            value = record.get(self.metric)
            after = [step for step in steps if step >= record["step"]]
            if after and isinstance(value, int | float):
                values[after[0]] = float(value)
        order = sorted(values, key=lambda step: (values[step] if self.highest else -values[step], step))
        return set(order[-self.count :])


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Says which checkpoints stay when a new one is published.

    Args:
        last: how many of the newest.
        every: those whose global step is a multiple of it stay for ever; null: none.
        best: those stay too, for as long as they are the best; null: none.
    """

    last: int = 3
    every: int | None = None
    best: Best | None = None

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"keep_last is {self.last}; at least the newest checkpoint must stay")
        if self.every is not None and self.every < 1:
            raise ValueError(f"keep_every is {self.every}; give a number of steps, or null")

    def kept(self, steps: Sequence[int], records: Iterable[Mapping[str, Any]] = ()) -> set[int]:
        """Returns those of `steps`, ascending, whose checkpoints stay.

        Args:
            records: of the metrics file; only `best` looks at them.
        """
        regular = {step for step in steps if self.every and step % self.every == 0}
        return {*steps[-self.last :], *regular, *(self.best.choose(steps, records) if self.best else ())}
