"""What trainers of a tiny model are made of, and what tests ask of them."""

import numpy as np

from eagle_train.data.ledger import LedgerShard
from eagle_train.data.stream import Cursor, Step
from eagle_train.track.throughput import Throughput
from eagle_train.train.schedule import Stage
from tests.toys import tiny_sample

RATES = {"mixture": 1e-2, "projector": 1e-2, "llm": 1e-2}
SHARDS = [LedgerShard(source="b", location="b/b-000000.tar", num_samples=3)]
SAMPLES = [tiny_sample(i, tiles=i % 3, text=8 + i, source="ab"[i % 2]) for i in range(8)]


def stage(**changes):
    values = {"recipe": "x", "learning_rates": RATES, "max_length": 256, "rows_per_step": 1, "num_steps": 4}
    return Stage(**values | {"warmup_ratio": 0.0} | changes)


def step_of(row):
    """A step of the plan that has the samples of one row, all of source b."""
    read = np.array([0, len(row.uses)])
    after = Cursor(epoch=0, window=row.row, first_row=0)
    return Step(
        number=row.row, first_row=row.row, rows=(), costs=np.zeros(1), num_tokens=0, num_tiles=0, read=read, after=after
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.engine.model.named_parameters()}


def step(trainer, rows):
    _, metrics = trainer.train_step(rows, Throughput())
    return metrics | trainer.flush_losses()
