"""Every fusion, and the Eagles in small, train on the toy set on the road that real runs take."""

import statistics

import pytest

from eagle_train.train.app import train
from eagle_train.train.config import load_config
from tests.runs import losses, overrides

NUM_STEPS = 110


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixture",
    [
        "toy_x5",
        "toy_move",
        "toy_sequence_append",
        "toy_mixture_adapter",
        "toy_deformable_attention",
    ],
)
def test_the_loss_of_a_toy_run_falls(mixture, data, tmp_path):
    own = [one for one in overrides(data, tmp_path / "run") if not one.startswith("mixture.")]
    steps = ["schedule.pretrain.num_steps=2", f"schedule.sft.num_steps={NUM_STEPS}", "save_every=1000"]
    rates = ["schedule.sft.learning_rates.llm=3e-3"]
    assert train(load_config([*own, f"mixture={mixture}", *steps, *rates]))
    curve = losses(tmp_path / "run")[2:]
    assert len(curve) == NUM_STEPS
    assert statistics.mean(curve[-5:]) < 0.5 * statistics.mean(curve[:5])
