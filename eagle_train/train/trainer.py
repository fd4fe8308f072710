"""The training loop of one stage: packed rows in, optimizer steps out.

What depends on DeepSpeed is behind `Engine`, what depends on W&B behind `Tracker`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch

from eagle_train import dist
from eagle_train.data.budget import BadSampleBudget, TooManyBadSamples
from eagle_train.data.ledger import Ledger
from eagle_train.data.stream import Step
from eagle_train.model.pass_flops import StepFlops
from eagle_train.track.goodput import Goodput
from eagle_train.track.profiler import Profiler
from eagle_train.track.throughput import Throughput
from eagle_train.track.tracker import Tracker
from eagle_train.train.anomalies import (
    Anomaly,
    AnomalyGuard,
    AnomalyPolicy,
    Kind,
    NonFiniteLossError,
    RollBack,
    samples_of,
    suspects,
)
from eagle_train.train.checkpoint import TrainState
from eagle_train.train.engine import Engine
from eagle_train.train.freeze_proof import FreezeProof
from eagle_train.train.heartbeat import Heart
from eagle_train.train.preemption import PreemptionFlag
from eagle_train.train.schedule import Stage, lr_scale
from eagle_train.train.source_losses import mean_losses, sums_by_source
from eagle_train.types import PackedBatch, SampleError

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """Runs one stage from `state.step` to its last step.

    Args:
        engine: owns the model, precision, sharding and optimizer.
        steps: from `state.step` on, each with this rank's rows of it.
        stage, num_steps: what is trained, and for how many optimizer steps.
        sources: names of the stage's sources.
        state: counts; kept current, and what `save` stores.
        heart: is told what this rank is doing.
        save: writes a checkpoint of `state`; all ranks call it together. With `wait=False` it may return before it
            is published, after a copy was made.
        poll: called after every step by all ranks together: publishes what was saved meanwhile.
        save_every, log_every: steps between; the last step always does both.
        meter: what rates are worked out by.
        flops: of rows; None: they are not counted.
        goodput: told what the time goes into.
        profiler: told of every step; None: nothing is profiled.
        proof: of the freeze table, which the first update completes; null: none.
        guard: judges the losses; null: one that stops at the first that is not finite.
        record: writes an anomaly down, on all ranks together.
        can_return: whether the stage has a checkpoint to go back to; all ranks ask together.
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
    heart: Heart
    save: Callable[..., object]
    save_every: int
    log_every: int
    poll: Callable[[], object] = lambda: None
    meter: Throughput = field(default_factory=Throughput)
    flops: StepFlops | None = None
    goodput: Goodput = field(default_factory=Goodput)
    profiler: Profiler | None = None
    proof: FreezeProof | None = None
    guard: AnomalyGuard | None = None
    record: Callable[[Anomaly], None] = lambda anomaly: None
    can_return: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.guard is None:
            self.guard = AnomalyGuard(policy=AnomalyPolicy(), stage=self.state.stage, losses=[])
        self.passed_over = self.guard.passed_over()
        # (number of sources, 2): weighted loss sums and weight sums since the last log
        self.sums = torch.tensor([self.state.loss_sums.get(s, (0, 0)) for s in self.sources], dtype=torch.float64)

    def fit(self) -> bool:
        """Trains to the end of the stage; returns False if a signal came, state saved.

        Raises:
            NonFiniteLossError: after saving the state before the step.
            TooManyBadSamples: see `budget`.
        """
        while self.state.step < self.num_steps:
            if self.profiler is not None:
                with self.goodput.phase("other"):
                    self.profiler.at(self.state.global_step)
            started = time.perf_counter()
            self.heart.beat("data", self.state.global_step)
            with self.goodput.phase("data_wait"):
                step, rows = next(self.steps)
            waited = time.perf_counter() - started
            preempted, metrics = self.train_step(rows, self.meter)
            self.book(step)
            self.goodput.reach(self.state.global_step)
            self.meter.update(
                capacity=self.stage.rows_per_step * self.stage.max_length,
                data_wait_seconds=waited,
                step_seconds=time.perf_counter() - started,
            )
            if self.profiler is not None:
                with self.goodput.phase("other"):
                    self.profiler.done(self.state.global_step)
            self.poll()
            self.heart.beat("log", self.state.global_step)
            if self.due(self.log_every):
                speed = self.meter.flush() | self.goodput.metrics()
                speed["time/eta_seconds"] = (self.num_steps - self.state.step) * speed["time/step_seconds"]
                self.tracker.log(metrics | self.flush_losses() | speed, self.state.global_step)
            elif "train/anomaly" in metrics:  # it is told also where no record is due
                self.tracker.log(metrics, self.state.global_step)
            if preempted or self.due(self.save_every):
                self.heart.beat("save", self.state.global_step)
                self.save(wait=preempted or self.state.step == self.num_steps)
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
            float(self.preempted.asked()),
            *self.count_flops(rows),
        ]
        self.heart.beat("agree", self.state.global_step, [key for row in rows for key in row.keys])
        weight, tokens, supervised, images, bad, stop, useful, executed = dist.all_reduce_sum(counts)
        if bad:
            self.count_bad(errors)
        metrics = {"stage": self.state.stage, "stage_step": self.state.step + 1}
        if weight > 0 and self.state.step not in self.passed_over:
            metrics |= self.update(rows, weight)
        elif not weight and not bad:
            raise ValueError(f"step {self.state.step} of stage {self.state.stage} holds no supervised token")
        self.state.step += 1
        self.state.global_step += 1
        self.state.tokens_seen += int(tokens)
        meter.update(tokens=int(tokens), supervised=int(supervised), images=int(images))
        meter.update(useful_flops=useful, executed_flops=executed)
        return stop > 0, metrics | {"train/tokens_seen": self.state.tokens_seen}

    def count_flops(self, rows: list[PackedBatch]) -> tuple[float, float]:
        """Returns the useful and the executed FLOPs of this rank's rows, see `StepFlops`; 0 if unknown or not run."""
        counted = [self.flops.of(row) for row in rows if self.flops and self.state.step not in self.passed_over]
        return sum(useful for useful, _ in counted), sum(executed for _, executed in counted)

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
            NonFiniteLossError, RollBack: see `respond`.
            FreezeError: see `proof`.
        """
        losses: list[torch.Tensor] = []
        sums = sum(self.run_row(row, weight, losses, last=i == len(rows) - 1) for i, row in enumerate(rows))
        sums = torch.tensor(dist.all_reduce_sum(sums.flatten().tolist()), dtype=torch.float64).view(-1, 2)
        loss = float(sums[:, 0].sum()) / weight
        self.heart.beat("update", self.state.global_step)
        if (kind := self.guard.judge(loss)) is not None:
            return self.respond(kind, loss, None, rows, losses)
        warmup = self.stage.num_warmup_steps(self.num_steps)
        scale = lr_scale(self.state.step, self.num_steps, warmup, self.stage.min_lr_ratio)
        rates, grad_norm = self.engine.step(scale)
        if not math.isfinite(grad_norm):
            return self.respond("gradient", loss, grad_norm, rows, losses)
        if self.proof is not None:
            proven, self.proof = self.proof.check(), None
            if dist.rank() == 0:
                log.warning("stage %s: %s", self.state.stage, proven)
        self.sums += sums
        self.state.loss_sums = dict(zip(self.sources, self.sums.tolist(), strict=True))
        return {"train/grad_norm": grad_norm} | {f"lr/{name}": rate for name, rate in rates.items()}

    def flush_losses(self) -> dict[str, float]:
        """Returns the mean loss since the last log, of all and by source, and begins anew."""
        means = mean_losses(self.sums, self.sources)
        self.sums.zero_()
        self.state.loss_sums = {}
        return means

    def run_row(self, row: PackedBatch, weight: float, losses: list[torch.Tensor], *, last: bool) -> torch.Tensor:
        """Runs one row forward and backward.

        Args:
            losses: gets the weighted losses of its tokens, (T,) float32.

        Returns:
            (number of sources, 2) float64, on the engine's device: weighted loss sum and weight sum by source.
        """
        self.heart.beat("row", self.state.global_step, row.keys)
        on_device = row.to(self.engine.device)
        torch.manual_seed(self.stage.row_seed(row.row))
        weighted = self.engine.forward(on_device) * on_device.loss_weights
        self.engine.backward(weighted.sum() / weight, last=last)
        losses.append(weighted.detach())
        return sums_by_source(row, losses[-1], self.sources)

    def respond(
        self, kind: Kind, loss: float, grad_norm: float | None, rows: list[PackedBatch], losses: list[torch.Tensor]
    ) -> dict[str, float]:
        """Does about an anomaly what the guard says; the weights stay as they were before the step.

        Raises:
            NonFiniteLossError: after saving the state before the step.
            RollBack: to be followed by a return to the newest checkpoint.
        """
        limit = self.guard.policy.limit(self.guard.losses)
        found = [each for row, of_row in zip(rows, losses, strict=True) for each in suspects(row, of_row.cpu(), limit)]
        found = [each for of_rank in dist.gather_objects(found) for each in of_rank]
        if not found:  # a gradient, whose sample cannot be told
            mine = [each for row in rows for each in samples_of(row)]
            found = [each for of_rank in dist.gather_objects(mine) for each in of_rank]
        self.heart.beat("save", self.state.global_step)  # what comes may write or read a checkpoint
        anomaly = Anomaly(
            stage=self.state.stage,
            step=self.state.step,
            kind=kind,
            loss=loss,
            grad_norm=grad_norm,
            limit=None if math.isinf(limit) else limit,
            action=self.guard.decide(self.state.step, can_return=self.can_return),
            keys=tuple(key for key, _ in found),
            samples=tuple(place for _, place in found),
        )
        self.guard.past.append(anomaly)
        if grad_norm is None:
            self.engine.step(0.0, discard=True)
        if self.proof is not None:
            self.proof.forget()
        if anomaly.action == "stop":
            self.save()
            self.record(anomaly)
            raise NonFiniteLossError(f"{anomaly.in_words()}. The state before it is saved")
        self.record(anomaly)
        if anomaly.action == "rollback":
            raise RollBack
        return {"train/anomaly": 1.0}

    def count_bad(self, errors: list[tuple[str, SampleError]]) -> None:
        """Counts the bad samples of all ranks; over the budget, saves and raises TooManyBadSamples."""
        for of_rank in dist.gather_objects(errors):
            self.budget.add(of_rank)
        try:
            self.budget.check()
        except TooManyBadSamples:
            self.heart.beat("save", self.state.global_step)
            self.save()
            raise

    def due(self, every: int) -> bool:
        """Whether something done `every` steps falls on the current step; the last step always does."""
        return self.state.step % every == 0 or self.state.step == self.num_steps
