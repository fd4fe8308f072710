"""What ZeRO is planned to cost; what it does is in test_ranks.py and test_zero3.py."""

import pytest

from eagle_train.train.zero.engine import ZeroEngine


@pytest.mark.parametrize(
    ("zero_stage", "parameters", "gradients", "optimizer"),
    [(1, 200, 160, 120), (2, 200, 40, 120), (3, 50, 40, 120)],
)
def test_each_stage_shards_more(zero_stage, parameters, gradients, optimizer):
    cost = ZeroEngine.state_bytes(100, 40, 4, zero_stage=zero_stage, bf16=None, reduce_bucket_size=1)
    assert cost == {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}


def test_float32_has_no_master_weights():
    cost = ZeroEngine.state_bytes(100, 40, 1, zero_stage=3, bf16=False)
    assert cost == {"parameters": 400, "gradients": 160, "optimizer": 320}


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="no zero_stage 0; use 1, 2 or 3"):
        ZeroEngine(None, None, 1, zero_stage=0)
