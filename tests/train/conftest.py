"""Trainers of a tiny model."""

import pytest

from eagle_train.data.budget import BadSampleBudget
from eagle_train.data.ledger import Ledger
from eagle_train.track.tracker import Trackers
from eagle_train.train.checkpoint import TrainState
from eagle_train.train.engine import PlainEngine
from eagle_train.train.heartbeat import Heart
from eagle_train.train.optim import freeze
from eagle_train.train.preemption import PreemptionFlag
from eagle_train.train.trainer import Trainer
from tests.toys import tiny_model
from tests.train.trainers import SHARDS, stage, step_of


@pytest.fixture
def make(tmp_path):
    """Makes trainers of one stage, which write one ledger; `saved` collects how each save was asked to wait."""
    flag = PreemptionFlag()
    ledgers = []

    def trainer(rows_per_step=1, batches=(), saved=None, share=1.0, **changes):
        model = tiny_model()
        plan = stage(rows_per_step=rows_per_step, **changes)
        freeze(model, plan.learning_rates)
        ledgers.append(Ledger(tmp_path / "ledger", "sft", 0, len(ledgers), SHARDS))
        return Trainer(
            engine=PlainEngine(model, plan, rows_per_step),
            steps=((step_of(row), [row]) for row in batches),
            stage=plan,
            num_steps=4,
            sources=["a", "b"],
            state=TrainState(stage="sft"),
            tracker=Trackers([]),
            ledger=ledgers[-1],
            budget=BadSampleBudget({"a": 100, "b": 100}, {"a": share, "b": 1.0}, []),
            preempted=flag,
            heart=Heart(),
            save=lambda wait=True: (saved if saved is not None else []).append(wait),
            save_every=100,
            log_every=1,
        )

    yield trainer
    flag.close()
    for ledger in ledgers:
        ledger.close()
