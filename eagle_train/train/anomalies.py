"""Steps that went wrong: a loss or gradient that is not finite, or a loss far above the recent ones, and what is done.

The ladder: the step is skipped; if that happens too often, the run goes back to its newest checkpoint, and what was
wrong is passed over or left out; at last the run stops. Every rung is recorded in the run's `anomalies.jsonl`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from eagle_train.track.jsonl import end_torn_line
from eagle_train.types import PackedBatch

ANOMALIES = "anomalies.jsonl"
SIGMA = 1.4826
"""Standard deviation over median absolute deviation, of a normal distribution."""
FLOOR = 0.01
"""Of the median loss; the least deviation that is reckoned with."""

SHOWN = 20
"""Keys in a message."""

Kind = Literal["loss", "gradient", "spike"]
Action = Literal["skip", "rollback", "stop"]


class NonFiniteLossError(ValueError):
    """The run stops for an anomaly: mostly a loss or a gradient that is NaN or infinite."""


class RollBack(Exception):
    """The run is to go on from its newest checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnomalyPolicy:
    """What counts as an anomaly, and how many are borne on each rung.

    Args:
        spike_deviations: a loss is a spike if it is so many standard deviations (robust: by the median absolute
            deviation) above the median of the last `window` steps; null: only what is not finite is an anomaly.
        window: steps that are remembered.
        skips: steps out of `window` whose update may be left out before the next rung.
        rollbacks: returns to the newest checkpoint in a stage before the run stops.
        quarantine: after a return, the steps that were wrong run again without the samples that were; false: they are
            passed over as a whole.
    """

    spike_deviations: float | None = None
    window: int = 128
    skips: int = 0
    rollbacks: int = 0
    quarantine: bool = False

    def __post_init__(self) -> None:
        if self.window < 8 or self.skips < 0 or self.rollbacks < 0:
            raise ValueError(
                f"anomalies: window {self.window} (at least 8), skips {self.skips} and rollbacks {self.rollbacks} "
                "(at least 0)"
            )
        if self.spike_deviations is not None and self.spike_deviations <= 0:
            raise ValueError(f"anomalies.spike_deviations is {self.spike_deviations}; it must be above 0, or null")

    def limit(self, losses: Sequence[float]) -> float:
        """Returns the loss above which a step is a spike; infinite until half a window of losses is known."""
        if self.spike_deviations is None or 2 * len(losses) < self.window:
            return math.inf
        median = statistics.median(losses)
        deviation = SIGMA * statistics.median(abs(loss - median) for loss in losses)
        return median + self.spike_deviations * max(deviation, FLOOR * abs(median))


@dataclass(frozen=True, kw_only=True, slots=True)
class Anomaly:
    """One step that went wrong, and what was done; a line of `anomalies.jsonl`."""

    stage: str
    step: int
    """In its stage, from 0."""
    kind: Kind
    loss: float
    grad_norm: float | None
    """None where the step was judged before there was one."""
    limit: float | None
    """Of the loss; None where there is none yet."""
    action: Action
    keys: tuple[str, ...]
    """Samples that are suspected: those whose own loss is wrong, or all of the step."""
    samples: tuple[tuple[int, int], ...]
    """The same ones: number of the shard in the stage's catalog, and row there."""

    def in_words(self) -> str:
        """Returns what happened and what is done."""
        what = {
            "loss": f"the loss is {self.loss}",
            "spike": f"the loss {self.loss:.4g} is above {self.limit or math.nan:.4g}",
            "gradient": f"the gradient norm is {self.grad_norm}",
        }[self.kind]
        done = {
            "skip": "its update is left out",
            "rollback": "the run goes back to its newest checkpoint",
            "stop": "the run stops",
        }[self.action]
        keys = ", ".join(self.keys[:SHOWN]) + (f" and {len(self.keys) - SHOWN} more" if len(self.keys) > SHOWN else "")
        return f"step {self.step} of stage {self.stage}: {what}; {done}. Samples suspected: {keys}"


@dataclass(kw_only=True)
class AnomalyGuard:
    """Judges the steps of one stage; the same on every rank.

    Args:
        policy: what is done.
        stage: name of the stage.
        losses: of the last steps; kept current, and part of the run's state, so that a resumed run judges alike.
        past: what was recorded before, of all stages.
    """

    policy: AnomalyPolicy
    stage: str
    losses: list[float]
    past: list[Anomaly] = field(default_factory=list)

    def judge(self, loss: float) -> Kind | None:
        """Returns what is wrong with the loss of a step; a sound one is remembered."""
        if not math.isfinite(loss):
            return "loss"
        if loss > self.policy.limit(self.losses):
            return "spike"
        if self.policy.spike_deviations is not None:
            self.losses.append(loss)
            del self.losses[: -self.policy.window]
        return None

    def decide(self, step: int, can_return: Callable[[], bool]) -> Action:
        """Returns what is done about an anomaly in `step`.

        Args:
            can_return: tells whether the stage has a checkpoint to go back to; asked only where that matters, since
                it has to be read for it.
        """
        of_stage = [anomaly for anomaly in self.past if anomaly.stage == self.stage]
        skipped = {a.step for a in of_stage if a.action == "skip" and step - self.policy.window < a.step < step}
        if len(skipped - self.passed_over()) < self.policy.skips:
            return "skip"
        returns = sum(anomaly.action == "rollback" for anomaly in of_stage)
        return "rollback" if returns < self.policy.rollbacks and can_return() else "stop"

    def passed_over(self) -> set[int]:
        """Returns the steps that are not run again after a return."""
        return set() if self.policy.quarantine else {anomaly.step for anomaly in self._returned()}

    def left_out(self) -> frozenset[tuple[int, int]]:
        """Returns the samples (shard, row) that are left out after a return."""
        samples = (sample for anomaly in self._returned() for sample in anomaly.samples)
        return frozenset(samples) if self.policy.quarantine else frozenset()

    def _returned(self) -> list[Anomaly]:
        """Returns the anomalies of the stage up to its last return."""
        of_stage = [anomaly for anomaly in self.past if anomaly.stage == self.stage]
        last = max((place for place, anomaly in enumerate(of_stage) if anomaly.action == "rollback"), default=-1)
        return of_stage[: last + 1]


def samples_of(row: PackedBatch) -> list[tuple[str, tuple[int, int]]]:
    """Returns key and (shard, index row) of the samples of a row."""
    places = [(use.shard, use.index) for use in row.uses if use.error is None]
    return list(zip(row.keys, places, strict=True))


def suspects(row: PackedBatch, losses: torch.Tensor, limit: float) -> list[tuple[str, tuple[int, int]]]:
    """Returns those samples of a row whose own mean loss is not finite or above `limit`.

    Args:
        losses: (T,) float32, weighted, of the row or of the part of it that a rank has.
    """
    first = 0 if row.part is None else row.part.begin
    bounds = (row.cu_seqlens - first).clamp(0, len(losses)).tolist()
    found = []
    for sample, begin, end in zip(samples_of(row), bounds, bounds[1:], strict=False):
        weight = float(row.loss_weights[begin:end].sum(dtype=torch.float64))
        mean = float(losses[begin:end].sum(dtype=torch.float64)) / weight if weight else 0.0
        if not math.isfinite(mean) or mean > limit:
            found.append(sample)
    return found


def read_anomalies(folder: Path) -> list[Anomaly]:
    """Returns what a run recorded, in its order; a line that was cut short by a crash is left out."""
    path = folder / ANOMALIES
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        samples = tuple((shard, row) for shard, row in fields.pop("samples"))
        found.append(Anomaly(**fields | {"keys": tuple(fields["keys"]), "samples": samples}))
    return found


def write_anomaly(folder: Path, anomaly: Anomaly) -> None:
    """Appends one anomaly to those of a run, on a line of its own also after one that was cut short."""
    end_torn_line(folder / ANOMALIES)
    with (folder / ANOMALIES).open("a") as file:
        file.write(json.dumps(asdict(anomaly)) + "\n")
