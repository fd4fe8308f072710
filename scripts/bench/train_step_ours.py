"""Our trainer, and a bare PyTorch loop over the same model and packed rows, for train_step.py."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from eagle_train.data.budget import BadSampleBudget
from eagle_train.data.ledger import Ledger, LedgerShard
from eagle_train.data.stream import Cursor, Step
from eagle_train.model.pass_flops import StepFlops
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.console import ConsoleTracker
from eagle_train.track.goodput import Goodput
from eagle_train.track.jsonl import JsonlTracker
from eagle_train.track.throughput import Throughput
from eagle_train.track.tracker import Trackers
from eagle_train.train.checkpoint import TrainState
from eagle_train.train.engine import PlainEngine
from eagle_train.train.heartbeat import Heart
from eagle_train.train.preemption import PreemptionFlag
from eagle_train.train.schedule import Stage
from eagle_train.train.trainer import Trainer
from eagle_train.types import PackedBatch

SOURCES = ["images", "texts"]
RATE = 1e-5


def clock(device: torch.device) -> Callable[[], float]:
    """Returns what tells seconds: processor time on a CPU, which may be shared; on a GPU time when it is done."""
    if device.type == "cpu":
        return time.process_time

    def finished() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return finished


def make_stage(num_steps: int, capacity: int) -> Stage:
    """Returns a stage that trains everything, one row a step."""
    rates = dict.fromkeys(("mixture", "projector", "llm"), RATE)
    return Stage(recipe="", learning_rates=rates, max_length=capacity, rows_per_step=1, num_steps=num_steps)


def ours(engine: PlainEngine, stage: Stage, rows: Sequence[PackedBatch], flops: StepFlops, folder: Path) -> list[float]:
    """Returns the seconds of each step of the real trainer, with its ledger, metrics, console and goodput."""
    times: list[float] = []
    now = clock(engine.device)

    def steps() -> Iterator[tuple[Step, list[PackedBatch]]]:
        for number, row in enumerate(rows):
            read = np.array([row.sources.count(source) for source in SOURCES])
            after = Cursor(epoch=0, window=0, first_row=number + 1)
            began = now()
            yield (
                Step(
                    number=number,
                    first_row=number,
                    rows=(),
                    costs=np.zeros(1),
                    num_tokens=0,
                    num_tiles=0,
                    read=read,
                    after=after,
                ),
                [row],
            )
            times.append(now() - began)

    shard = LedgerShard(source="images", location="synthetic.tar", num_samples=10**6)
    ledger = Ledger(folder / "ledger", "bench", 0, 0, [shard])
    console = ConsoleTracker(console=Console(file=io.StringIO()))
    trackers = Trackers([JsonlTracker(folder / "metrics.jsonl"), console])
    trackers.begin_stage("bench", 0, len(rows))
    goodput, flag = Goodput(folder / "goodput.jsonl"), PreemptionFlag()
    feed = steps()
    trainer = Trainer(
        engine=engine,
        steps=feed,
        stage=stage,
        num_steps=len(rows),
        sources=SOURCES,
        state=TrainState(stage="bench"),
        tracker=trackers,
        ledger=ledger,
        budget=BadSampleBudget(dict.fromkeys(SOURCES, 10**6), dict.fromkeys(SOURCES, 0.1), []),
        preempted=flag,
        heart=Heart(),
        save=lambda **_: None,
        save_every=10**9,
        log_every=10,
        meter=Throughput(),
        flops=flops,
        goodput=goodput,
    )
    trainer.fit()
    next(feed, None)  # ends the last step
    for each in (flag, goodput, trackers, ledger):
        each.close()
    return times


def bare(engine: PlainEngine, stage: Stage, rows: Sequence[PackedBatch]) -> list[float]:
    """Returns the seconds of each step of a loop in ten lines: same model, same optimizer, no records."""
    model: VisionLanguageModel = engine.model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    now, times = clock(engine.device), []
    for row in rows:
        began = now()
        batch = row.to(engine.device)
        weight = batch.loss_weights.sum()
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.bf16):
            losses = model(batch)
        loss = (losses * batch.loss_weights).sum() / weight
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm)
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        loss.item()  # a loop that never looks at its loss trains blindly
        times.append(now() - began)
    return times
