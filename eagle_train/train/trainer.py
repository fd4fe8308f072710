"""The training loop of one stage: packed rows in, optimizer steps out.

What depends on DeepSpeed is behind `Engine`, what depends on W&B behind `Tracker`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from eagle_train import dist
from eagle_train.data.budget import BadSampleBudget, TooManyBadSamples
from eagle_train.data.ledger import Ledger
from eagle_train.data.stream import Step
from eagle_train.track.throughput import Throughput
from eagle_train.track.tracker import Tracker
from eagle_train.train.checkpoint import TrainState
from eagle_train.train.engine import Engine
from eagle_train.train.freeze_proof import FreezeProof
from eagle_train.train.preemption import PreemptionFlag
from eagle_train.train.schedule import Stage, lr_scale
from eagle_train.types import PackedBatch, SampleError

log = logging.getLogger(__name__)


class NonFiniteLossError(ValueError):
    """The loss or the gradient of a step is NaN or infinite."""


@dataclass(kw_only=True)
class Trainer:
    """Runs one stage from `state.step` to its last step.

    Args:
        engine: owns the model, precision, sharding and optimizer.
        steps: from `state.step` on, each with this rank's rows of it.
        stage, num_steps: what is trained, and for how many optimizer steps.
        sources: names of the stage's sources.
        state: counts; kept current, and what `save` stores.
        save: writes a checkpoint of `state`; all ranks call it together.
        save_every, log_every: steps between; the last step always does both.
        proof: of the freeze table, which the first update completes; null: none.
    """

    engine: Engine
    steps: Iterator[tuple[Step, list[PackedBatch]]]
    stage: Stage
    num_steps: int
    sources: list[str]
    state: TrainState
    tracker: Tracker
    ledger: Ledger
    budget: BadSampleBudget
    preempted: PreemptionFlag
    save: Callable[[], None]
    save_every: int
    log_every: int
    proof: FreezeProof | None = None

    def __post_init__(self) -> None:
        # (number of sources, 2): weighted loss sums and weight sums since the last log
        self.sums = torch.zeros(len(self.sources), 2, dtype=torch.float64)

    def fit(self) -> bool:
        """Trains to the end of the stage; returns False if a signal came, state saved.

        Raises:
            NonFiniteLossError: after saving the state before the step.
            TooManyBadSamples: see `budget`.
        """
        meter = Throughput()
        while self.state.step < self.num_steps:
            started = time.perf_counter()
            step, rows = next(self.steps)
            waited = time.perf_counter() - started
            preempted, metrics = self.train_step(rows, meter)
            self.book(step)
            meter.update(
                capacity=self.stage.rows_per_step * self.stage.max_length,
                data_wait_seconds=waited,
                step_seconds=time.perf_counter() - started,
            )
            if self.due(self.log_every):
                speed = meter.flush()
                left = (self.num_steps - self.state.step) * speed["time/step_seconds"]
                self.tracker.log(
                    metrics | self.flush_losses() | speed | {"time/eta_seconds": left}, self.state.global_step
                )
            if preempted or self.due(self.save_every):
                self.save()
            if preempted:
                return False
        return True

    def train_step(self, rows: list[PackedBatch], meter: Throughput) -> tuple[bool, dict]:
        """Takes one optimizer step; returns whether any rank was asked to stop, and the step's metrics.

        The loss is the weighted mean over the supervised tokens of all ranks and micro-batches, so it
        depends neither on how samples were packed nor on how many ranks share them. A step of which every
        sample turned out bad is passed over, on all ranks.
        """
        for row in rows:
            self.ledger.record(self.state.step, row)
        self.ledger.flush()
        errors = [error for row in rows for error in row.errors]
        counts = [
            sum(float(row.loss_weights.sum(dtype=torch.float64)) for row in rows),
            sum(row.num_tokens for row in rows),
            sum(int((row.loss_weights > 0).sum()) for row in rows),
            sum(row.num_images for row in rows),
            len(errors),
            float(self.preempted.signal is not None),
        ]
        weight, tokens, supervised, images, bad, stop = dist.all_reduce_sum(counts)
        if bad:
            self.count_bad(errors)
        metrics = {"stage": self.state.stage, "stage_step": self.state.step + 1}
        if weight > 0:
            metrics |= self.update(rows, weight)
        elif not bad:
            raise ValueError(f"step {self.state.step} of stage {self.state.stage} holds no supervised token")
        self.state.step += 1
        self.state.global_step += 1
        self.state.tokens_seen += int(tokens)
        meter.update(tokens=int(tokens), supervised=int(supervised), images=int(images))
        return stop > 0, metrics | {"train/tokens_seen": self.state.tokens_seen}

    def book(self, step: Step) -> None:
        """Takes down where the stream stands after a step, and what was read."""
        self.state.cursor = asdict(step.after)
        for source, count in zip(self.sources, step.read.tolist(), strict=True):
            self.state.read[source] = self.state.read.get(source, 0) + count

    def update(self, rows: list[PackedBatch], weight: float) -> dict[str, float]:
        """Runs the rows and updates the weights; returns gradient norm and learning rates.

        Args:
            weight: sum of the loss weights of all ranks' rows.

        Raises:
            NonFiniteLossError: after saving the state before the update.
            FreezeError: see `proof`.
        """
        sums = sum(self.run_row(row, weight, last=i == len(rows) - 1) for i, row in enumerate(rows))
        sums = torch.tensor(dist.all_reduce_sum(sums.flatten().tolist()), dtype=torch.float64).view(-1, 2)
        loss = float(sums[:, 0].sum()) / weight
        if not math.isfinite(loss):
            self.stop_on_non_finite(f"loss {loss}", rows)
        scale = lr_scale(self.state.step, self.num_steps, self.stage.warmup_ratio, self.stage.min_lr_ratio)
        rates, grad_norm = self.engine.step(scale)
        if not math.isfinite(grad_norm):
            self.stop_on_non_finite(f"gradient norm {grad_norm}", rows)
        if self.proof is not None:
            proven, self.proof = self.proof.check(), None
            if dist.rank() == 0:
                log.warning("stage %s: %s", self.state.stage, proven)
        self.sums += sums
        return {"train/grad_norm": grad_norm} | {f"lr/{name}": rate for name, rate in rates.items()}

    def flush_losses(self) -> dict[str, float]:
        """Returns the mean loss since the last log, of all and by source, and begins anew."""
        means = mean_losses(self.sums, self.sources)
        self.sums.zero_()
        return means

    def run_row(self, row: PackedBatch, weight: float, *, last: bool) -> torch.Tensor:
        """Runs one row forward and backward.

        Returns:
            (number of sources, 2) float64: weighted loss sum and weight sum by source, of this row.
        """
        on_device = row.to(self.engine.device)
        losses = self.engine.forward(on_device) * on_device.loss_weights
        self.engine.backward(losses.sum() / weight, last=last)
        return sums_by_source(on_device, losses.detach(), self.sources)

    def count_bad(self, errors: list[tuple[str, SampleError]]) -> None:
        """Counts the bad samples of all ranks; over the budget, saves and raises TooManyBadSamples."""
        for of_rank in dist.gather_objects(errors):
            self.budget.add(of_rank)
        try:
            self.budget.check()
        except TooManyBadSamples:
            self.save()
            raise

    def stop_on_non_finite(self, what: str, rows: list[PackedBatch]) -> None:
        """Saves the state before this step and raises, naming the samples of the step's rows."""
        self.save()
        keys = [key for keys in dist.gather_objects([k for row in rows for k in row.keys]) for key in keys]
        raise NonFiniteLossError(
            f"{what} in step {self.state.step} of stage {self.state.stage}; the state before it is saved. "
            f"Samples of its rows: {', '.join(keys)}"
        )

    def due(self, every: int) -> bool:
        """Whether something done `every` steps falls on the current step; the last step always does."""
        return self.state.step % every == 0 or self.state.step == self.num_steps


def sums_by_source(row: PackedBatch, losses: torch.Tensor, sources: list[str]) -> torch.Tensor:
    """Returns (number of sources, 2) float64, on the CPU: weighted loss sum and weight sum by source, of a row.

    Args:
        losses: (T,) float32, weighted.
    """
    per_sample = torch.stack([losses, row.loss_weights]).double().cumsum(1).cpu()
    ends = row.cu_seqlens[1:].long().cpu() - 1
    sums = per_sample[:, ends].diff(dim=1, prepend=torch.zeros(2, 1, dtype=torch.float64)).T
    by_source = torch.zeros(len(sources), 2, dtype=torch.float64)
    places = [sources.index(source) for source in row.sources]
    return by_source.index_add(0, torch.tensor(places, dtype=torch.int64), sums[: len(places)])


def mean_losses(sums: torch.Tensor, sources: list[str]) -> dict[str, float]:
    """Returns the mean loss of all and by source, under the names of the metrics.

    Args:
        sums: (number of sources, 2) float64, weighted loss sums and weight sums.
    """
    names = ["train/loss", *(f"train/loss/{source}" for source in sources)]
    pairs = zip(names, [sums.sum(0).tolist(), *sums.tolist()], strict=True)
    return {name: loss / weight for name, (loss, weight) in pairs if weight > 0}
