import json
import math
from dataclasses import replace

import pytest
import torch

from eagle_train.train.anomalies import (
    ANOMALIES,
    Anomaly,
    AnomalyGuard,
    AnomalyPolicy,
    read_anomalies,
    suspects,
    write_anomaly,
)
from eagle_train.types import SampleError, SampleUse
from tests.toys import tiny_row, tiny_sample

SPIKY = AnomalyPolicy(spike_deviations=6.0, window=16, skips=2, rollbacks=1)


def anomaly(step, action, stage="sft", samples=((0, 1),)):
    """Returns an anomaly of a step."""
    return Anomaly(
        stage=stage,
        step=step,
        kind="loss",
        loss=math.nan,
        grad_norm=None,
        limit=None,
        action=action,
        keys=("a/b/c",),
        samples=samples,
    )


def guard(policy, past=(), losses=()):
    """Returns the guard of the stage sft."""
    return AnomalyGuard(policy=policy, stage="sft", losses=list(losses), past=list(past))


def test_a_loss_that_is_not_finite_is_an_anomaly_from_the_first_step():
    assert [guard(AnomalyPolicy()).judge(loss) for loss in (math.nan, math.inf, 3.0)] == ["loss", "loss", None]


def test_a_spike_is_one_against_the_recent_losses_and_is_not_remembered():
    watched = guard(SPIKY)
    assert [watched.judge(2.0 + 0.1 * (step % 2)) for step in range(16)] == [None] * 16
    assert watched.judge(2.4) is None and watched.judge(3.0) == "spike"
    assert len(watched.losses) == 16 and 3.0 not in watched.losses


def test_nothing_is_a_spike_before_half_a_window_or_without_a_limit():
    assert guard(SPIKY, losses=[1.0] * 7).judge(1e9) is None
    assert guard(AnomalyPolicy(), losses=[1.0] * 200).judge(1e9) is None


def test_losses_that_are_all_alike_do_not_make_the_next_one_a_spike():
    assert guard(SPIKY, losses=[1.0] * 16).judge(1.05) is None


def test_the_ladder_skips_then_returns_then_stops():
    past = []
    actions = []
    for step in (3, 5, 9, 10, 11, 12):
        actions.append(guard(SPIKY, past).decide(step, can_return=lambda: True))
        past.append(anomaly(step, actions[-1]))
    # 3, 5 and 9 are passed over after the return, so two more may be skipped.
    assert actions == ["skip", "skip", "rollback", "skip", "skip", "stop"]


def test_without_a_checkpoint_there_is_no_return():
    policy = AnomalyPolicy(skips=0, rollbacks=3)
    assert guard(policy).decide(4, can_return=lambda: False) == "stop"
    assert guard(policy).decide(4, can_return=lambda: True) == "rollback"


def test_the_default_stops_at_once_without_reading_a_checkpoint():
    assert guard(AnomalyPolicy()).decide(4, can_return=lambda: pytest.fail("asked")) == "stop"
    assert guard(AnomalyPolicy(skips=1, rollbacks=1)).decide(4, can_return=lambda: pytest.fail("asked")) == "skip"


def test_a_step_that_is_run_again_after_a_restart_counts_once():
    past = [anomaly(2, "skip"), anomaly(3, "skip"), anomaly(3, "skip")]
    assert guard(SPIKY, past).decide(3, can_return=lambda: False) == "skip"
    past = [anomaly(3, "skip"), anomaly(3, "skip"), anomaly(3, "skip")]
    assert guard(SPIKY, past).decide(3, can_return=lambda: False) == "skip"
    assert guard(SPIKY, past).decide(4, can_return=lambda: False) == "skip"


def test_skips_that_are_long_ago_or_of_another_stage_do_not_count():
    past = [anomaly(1, "skip"), anomaly(2, "skip")]
    past += [anomaly(step, action, stage="pretrain") for step, action in ((38, "rollback"), (39, "skip"), (40, "skip"))]
    assert guard(SPIKY, past).decide(41, can_return=lambda: False) == "skip"
    past += [anomaly(35, "skip"), anomaly(36, "skip")]
    assert guard(SPIKY, past).decide(41, can_return=lambda: True) == "rollback", "the first of this stage"


def test_after_a_return_what_was_wrong_is_passed_over_or_its_samples_left_out():
    past = [anomaly(3, "skip", samples=((0, 1),)), anomaly(5, "rollback", samples=((2, 7),)), anomaly(8, "skip")]
    assert guard(SPIKY, past).passed_over() == {3, 5} and not guard(SPIKY, past).left_out()
    quarantine = AnomalyPolicy(skips=1, rollbacks=1, quarantine=True)
    assert guard(quarantine, past).left_out() == {(0, 1), (2, 7)} and not guard(quarantine, past).passed_over()


def test_records_come_back_without_a_line_that_a_crash_cut_short(tmp_path):
    assert read_anomalies(tmp_path) == []
    for step in (3, 4):
        write_anomaly(tmp_path, anomaly(step, "skip"))
    with (tmp_path / ANOMALIES).open("a") as file:
        file.write(json.dumps({"stage": "sft"})[:9])
    found = read_anomalies(tmp_path)
    assert [(a.step, a.action, a.samples) for a in found] == [(3, "skip", ((0, 1),)), (4, "skip", ((0, 1),))]
    write_anomaly(tmp_path, anomaly(5, "rollback"))
    assert [a.step for a in read_anomalies(tmp_path)] == [3, 4, 5], "the next one is not lost with it"


@pytest.mark.parametrize(("bad", "limit"), [(math.nan, math.inf), (9.0, 5.0)])
def test_suspects_are_the_samples_whose_own_loss_is_wrong(bad, limit):
    samples = [tiny_sample(seed, tiles=0, text=10) for seed in range(3)]
    error = SampleError("x", "unreadable_image", "")
    uses = [
        SampleUse(shard=shard, index=4, num_tokens=0, num_targets=0, num_tiles=0, num_frames=0, error=gone)
        for shard, gone in ((0, None), (1, error), (2, None), (3, None))
    ]
    row = replace(tiny_row(samples), uses=tuple(uses))
    row = replace(row, loss_weights=torch.rand(len(row.input_ids)) + 0.5)  # at the ends of samples too
    losses = 2.0 * row.loss_weights
    start, end = row.cu_seqlens.tolist()[1:3]
    losses[start:end] = bad * row.loss_weights[start:end]
    assert suspects(row, losses, limit) == [(row.keys[1], (2, 4))]
    assert suspects(row, 2.0 * row.loss_weights, limit) == []


@pytest.mark.parametrize("fields", [{"window": 4}, {"skips": -1}, {"rollbacks": -1}, {"spike_deviations": 0.0}])
def test_a_policy_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match=r"anomalies"):
        AnomalyPolicy(**fields)
