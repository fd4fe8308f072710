"""What ZeRO is planned to cost; what it does is in test_ranks.py and test_zero3.py."""

import pytest

from eagle_train.train.schedule import Stage
from eagle_train.train.zero.engine import ZeroEngine
from tests.runs import run_ranks


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


def test_what_is_offloaded_counts_as_host_memory():
    fields = {"zero_stage": 3, "bf16": True}
    cost = ZeroEngine.state_bytes(100, 40, 4, offload_optimizer=True, **fields)
    assert cost == {"parameters": 50, "gradients": 0, "optimizer": 0, "host": 160}
    cost = ZeroEngine.state_bytes(100, 40, 4, offload_optimizer=True, offload_param=True, **fields)
    assert cost == {"parameters": 0, "gradients": 0, "optimizer": 0, "host": 210}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"zero_stage": 0}, "no zero_stage 0; use 1, 2 or 3"),
        ({"zero_stage": 2, "offload_param": True}, "offload_param needs engine.zero_stage=3, not 2"),
        ({"cpu_adam": True}, "cpu_adam needs engine.offload_optimizer=true"),
    ],
)
def test_what_zero_cannot_do_is_refused_before_anything_is_built(fields, said):
    stage = Stage(recipe="x", learning_rates={}, max_length=8, rows_per_step=1, num_steps=1)
    with pytest.raises(ValueError, match=said):
        ZeroEngine(None, stage, 1, **fields)


@pytest.mark.slow
def test_an_update_that_is_not_to_be_leaves_no_trace():
    ((code, said),) = run_ranks([], module="tests.discarded_update")
    assert code == 0 and "the same\n" in said, said
