"""Where the numbers of a run go: the `Tracker` protocol and the fan-out to several of them.

Only rank 0 has trackers; the other ranks hold `Trackers([])`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol

Metrics = Mapping[str, float | str]
"""Numbers by slash-separated name (`train/loss`, `lr/llm`, `time/step_seconds`); `stage` is the one word."""


class Tracker(Protocol):
    """Takes the metrics of a run. Steps are optimizer steps counted over all stages."""

    def begin_stage(self, stage: str, step: int, num_steps: int) -> None:
        """Announces that `stage` goes on from its own step `step` (0 when new) to `num_steps`."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Records the metrics of global step `step`."""

    def close(self, *, failed: bool = False) -> None:
        """Writes what is left; nothing may be logged afterwards.

        Args:
            failed: whether an error ended the run.
        """


class Trackers(list[Tracker]):
    """Several trackers used as one."""

    def begin_stage(self, stage: str, step: int, num_steps: int) -> None:
        """Announces a stage to all of them; see `Tracker.begin_stage`."""
        for tracker in self:
            tracker.begin_stage(stage, step, num_steps)

    def log(self, metrics: Metrics, step: int) -> None:
        """Hands the metrics to all of them."""
        for tracker in self:
            tracker.log(metrics, step)

    def close(self, *, failed: bool = False) -> None:
        """Closes all of them, also those after one that fails, and then raises its error."""
        with ExitStack() as stack:
            for tracker in reversed(self):
                stack.callback(tracker.close, failed=failed)
