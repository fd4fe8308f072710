"""Two ranks give what one gives; ZeRO-2 gives what plain torch gives."""

import pytest

from eagle_train.train.app import train
from tests.runs import config, losses, must_run, overrides, rows, run_ranks

ROWS = ("schedule.pretrain.rows_per_step=3", "schedule.sft.rows_per_step=4")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    """Plain torch on one rank, four micro-batches per step."""
    run = tmp_path_factory.mktemp("one_rank")
    assert train(config(data, run, *ROWS))
    return run


def test_two_ranks_equal_one(data, one_rank, tmp_path):
    must_run(overrides(data, tmp_path, *ROWS), ranks=2)
    assert losses(tmp_path) == pytest.approx(losses(one_rank), abs=1e-5)
    assert rows(tmp_path) == rows(one_rank)


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_2_equals_plain_torch(data, one_rank, tmp_path, ranks):
    must_run(overrides(data, tmp_path, *ROWS, "engine=zero2"), ranks=ranks)
    assert losses(tmp_path) == pytest.approx(losses(one_rank), abs=1e-5)
    assert rows(tmp_path) == rows(one_rank)
