"""What the trainer skips, passes over or stops for, and what it leaves as it was then."""

from itertools import repeat
from types import SimpleNamespace

import pytest
import torch

from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.collate import pack
from eagle_train.track.throughput import Throughput
from eagle_train.train.anomalies import AnomalyGuard, AnomalyPolicy, RollBack
from eagle_train.train.trainer import NonFiniteLossError
from eagle_train.types import SampleError
from tests.toys import TILE, booked, grown, tiny_row
from tests.train.trainers import SAMPLES, step, weights


def test_a_nan_loss_saves_and_names_the_samples(make):
    saved, found = [], []
    trainer = make(1, saved=saved)
    trainer.record = found.append
    trainer.engine.model.llm.lm_head.weight.data[3] = float("nan")
    before = weights(trainer)
    with pytest.raises(NonFiniteLossError, match="a/0, b/1") as error:
        trainer.train_step([tiny_row(SAMPLES)], Throughput())
    assert "step 0 of stage sft" in str(error.value)
    assert [(each.kind, each.action, each.limit) for each in found] == [("loss", "stop", None)]
    assert saved == [True] and trainer.state.step == 0
    assert all(torch.equal(v, before[n]) for n, v in weights(trainer).items() if n != "llm.lm_head.weight")


def test_a_skipped_spike_leaves_weights_and_moments_as_they_were_and_the_next_one_goes_back(make):
    saved, found, told = [], [], []
    policy = AnomalyPolicy(spike_deviations=6.0, window=8, skips=1, rollbacks=1)
    spiky, calm = make(1, saved=saved), make(1)
    spiky.guard = AnomalyGuard(policy=policy, stage="sft", losses=[1e9] * 8)
    spiky.record, spiky.can_return = found.append, lambda: True
    rows = [tiny_row(SAMPLES[i : i + 2]) for i in (0, 2, 4)]
    for trainer in (spiky, calm):
        trainer.train_step(rows[:1], Throughput())
    before = weights(spiky)
    spiky.guard.losses[:] = [0.5] * 8
    spiky.proof = SimpleNamespace(forget=lambda: told.append("forget"), check=lambda: told.append("check"))
    _, metrics = spiky.train_step(rows[1:2], Throughput())
    assert metrics["train/anomaly"] == 1.0 and "train/grad_norm" not in metrics and told == ["forget"]
    assert all(torch.equal(value, before[name]) for name, value in weights(spiky).items())
    with pytest.raises(RollBack):
        spiky.train_step(rows[1:2], Throughput())
    assert [(each.step, each.kind, each.action, each.keys) for each in found] == [
        (1, "spike", "skip", ("a/2", "b/3")),
        (2, "spike", "rollback", ("a/2", "b/3")),
    ]
    assert all(0.5 < each.limit < each.loss and each.grad_norm is None for each in found) and not saved
    spiky.__post_init__()  # as when the stage goes on after the return
    spiky.state.step = 1
    _, metrics = spiky.train_step(rows[1:2], Throughput())
    assert not {"train/anomaly", "train/grad_norm"} & set(metrics), "passed over"
    assert all(torch.equal(value, before[name]) for name, value in weights(spiky).items())
    spiky.guard.losses[:] = [1e9] * 8
    spiky.state.step = calm.state.step = 3
    for trainer in (spiky, calm):
        trainer.train_step(rows[2:], Throughput())
    assert told == ["forget", "forget", "check"] and spiky.proof is None
    assert all(torch.equal(value, weights(calm)[name]) for name, value in weights(spiky).items())
    assert spiky.flush_losses() == calm.flush_losses(), "what was left out is in no mean"


def test_bad_samples_over_the_share_save_and_stop_with_the_list(make):
    saved = []
    trainer = make(1, saved=saved, share=0.01)

    def row(i):
        error = SampleError(f"a/bad{i}", "unreadable_image", "broken")
        return booked(pack(SAMPLES[:2], [("a", error)], filler_id=0, tile_size=TILE))

    trainer.train_step([row(0)], Throughput())
    trainer.train_step([row(0)], Throughput())  # the same sample again counts once
    with pytest.raises(TooManyBadSamples, match="2 of 100 samples are bad") as error:
        trainer.train_step([row(1)], Throughput())
    assert "a/bad0" in str(error.value) and "a/bad1" in str(error.value)
    assert saved == [True]


def test_a_gradient_that_is_not_finite_updates_nothing_saves_and_names_the_samples(make):
    saved = []
    trainer = make(1, saved=saved)
    trainer.engine.model.projector.layers[0].weight.register_hook(lambda grad: grad * float("inf"))
    before = weights(trainer)
    with pytest.raises(NonFiniteLossError, match=r"step 0 .* gradient norm is (inf|nan).*a/0, b/1"):
        trainer.train_step([tiny_row(SAMPLES)], Throughput())
    assert saved == [True] and all(torch.equal(v, before[n]) for n, v in weights(trainer).items())


def test_a_step_of_which_every_sample_is_bad_is_passed_over(make):
    error = SampleError("a/bad", "unreadable_image", "broken")
    trainer = make(1)
    before = weights(trainer)
    metrics = step(trainer, [booked(pack([], [("a", error)], filler_id=0, tile_size=TILE))])
    assert trainer.state.step == 1 and "train/loss" not in metrics
    assert all(torch.equal(v, before[n]) for n, v in weights(trainer).items())


def test_a_signal_ends_the_stage_after_saving(make):
    saved = []
    trainer = make(1, batches=repeat(tiny_row(SAMPLES)), saved=saved)
    trainer.preempted.signal = 15
    assert not trainer.fit()
    assert trainer.state.step == 1 and saved == [True]


def test_a_step_without_supervised_tokens_is_refused(make):
    sample = grown(SAMPLES[0], loss_weights=torch.zeros_like(SAMPLES[0].loss_weights))
    with pytest.raises(ValueError, match="no supervised token"):
        make(1).train_step([tiny_row([sample])], Throughput())


def test_a_step_that_is_passed_over_has_no_flops(make):
    trainer = make()
    row = tiny_row(SAMPLES)
    trainer.flops = SimpleNamespace(of=lambda row: (2.0, 3.0))
    assert trainer.count_flops([row, row]) == (4.0, 6.0)
    trainer.passed_over = {0}
    assert trainer.count_flops([row, row]) == (0, 0)


def test_a_step_that_is_skipped_between_two_records_is_told(make):
    logged = []
    trainer = make(batches=[tiny_row(SAMPLES, number=n) for n in range(4)])
    trainer.log_every = 100
    trainer.tracker = SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)))
    trainer.guard = AnomalyGuard(policy=AnomalyPolicy(skips=1), stage="sft", losses=[])
    trainer.guard.judge = lambda loss: "spike" if trainer.state.step == 1 else None
    assert trainer.fit()
    assert [(step, "train/anomaly" in metrics, "train/loss" in metrics) for step, metrics in logged] == [
        (2, True, False),
        (4, False, True),
    ]
