"""Under every averaging policy the loss and its gradient are those of the samples, however they are packed."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle_train.data.collate import pack
from eagle_train.data.loss_weights import per_sample, per_token, square_root, square_root_per_turn
from eagle_train.track.tracker import Trackers
from eagle_train.train.checkpoint import TrainState
from eagle_train.train.heartbeat import Heart
from eagle_train.train.schedule import Stage
from eagle_train.train.trainer import Trainer
from eagle_train.types import EncodedSample

VOCAB = 97
LOSSES = torch.linspace(0.1, 9.0, VOCAB)  # of a token, by its id
NUMBERS = {  # what divides the sum over n tokens of a turn, in a sample of N
    per_token: lambda n, total: 1.0,
    per_sample: lambda n, total: total,
    square_root: lambda n, total: total**0.5,
    square_root_per_turn: lambda n, total: n**0.5,
}
TURNS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 60)), min_size=1, max_size=4)  # tokens before, and of, it


class Engine:
    """A model whose loss of a token is a parameter of its own, and whose gradients add up."""

    device = torch.device("cpu")

    def __init__(self):
        self.table = LOSSES.clone().requires_grad_()

    def forward(self, row):
        return self.table[row.input_ids]

    def backward(self, loss, *, last):
        del last
        loss.backward()

    def step(self, scale):
        del scale
        return {}, float(self.table.grad.norm())


def sample(turns, policy, seed):
    generator = torch.Generator().manual_seed(seed)
    supervised = torch.cat([torch.tensor([False] * before + [True] * n) for before, n in turns])
    return EncodedSample(
        key=f"s/{seed}",
        source="s",
        input_ids=torch.randint(0, VOCAB, supervised.shape, generator=generator),
        labels=supervised.long(),
        loss_weights=torch.from_numpy(policy(supervised.numpy())),
        image_positions=torch.empty(0, dtype=torch.int64),
        pixels=torch.empty(0, 3, 4, 4, dtype=torch.uint8),
    )


def by_definition(dialogues, samples, number):
    """Returns the loss and the gradient by token id, from the turns of each sample."""
    loss, weight, gradient = 0.0, 0.0, torch.zeros(VOCAB, dtype=torch.float64)
    for turns, encoded in zip(dialogues, samples, strict=True):
        total, place = sum(n for _, n in turns), 0
        for before, n in turns:
            ids = encoded.input_ids[place + before : place + before + n]
            place += before + n
            loss += float(LOSSES[ids].double().sum()) / number(n, total)
            weight += n / number(n, total)
            gradient += torch.bincount(ids, minlength=VOCAB).double() / number(n, total)
    return loss / weight, gradient / weight


def trained(rows):
    """Returns loss and gradient of one optimizer step on `rows`."""
    engine = Engine()
    trainer = Trainer(
        engine=engine,
        steps=iter(()),
        stage=Stage(recipe="r", learning_rates={}, max_length=64, rows_per_step=len(rows), num_steps=1),
        num_steps=1,
        sources=["s"],
        state=TrainState(stage="s"),
        tracker=Trackers([]),
        ledger=None,
        budget=None,
        preempted=None,
        heart=Heart(),
        save=lambda **_: None,
        save_every=1,
        log_every=1,
    )
    trainer.update(rows, sum(float(row.loss_weights.sum(dtype=torch.float64)) for row in rows))
    return trainer.flush_losses()["train/loss"], engine.table.grad


@pytest.mark.slow
@pytest.mark.parametrize("policy", NUMBERS, ids=lambda policy: policy.__name__)
@given(dialogues=st.lists(TURNS, min_size=1, max_size=8), rows=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_loss_is_that_of_the_samples_whatever_rows_they_share(policy, dialogues, rows, seed):
    samples = [sample(turns, policy, seed + i) for i, turns in enumerate(dialogues)]
    shared = [[] for _ in range(rows)]  # an empty row is that of a rank with nothing to do
    chance = random.Random(seed)
    for encoded in chance.sample(samples, len(samples)):
        chance.choice(shared).append(encoded)
    loss, gradient = trained([pack(row, [], filler_id=0, tile_size=4) for row in shared])
    expected, expected_gradient = by_definition(dialogues, samples, NUMBERS[policy])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-7)
