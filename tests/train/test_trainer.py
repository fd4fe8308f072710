"""One optimizer step: accumulation, ranks of rows, metrics, and what a stage records."""

from types import SimpleNamespace

import pytest
import torch

from eagle_train.data.collate import pack
from eagle_train.data.ledger import USED
from eagle_train.data.ledger_read import read_bad, read_ledger
from eagle_train.model.encoders.intern_vit import InternVit
from eagle_train.model.mixtures.channel_concat import ChannelConcat
from eagle_train.model.projector import MlpProjector
from eagle_train.track.throughput import Throughput
from eagle_train.types import REASONS, SampleError
from tests.toys import TILE, booked, tiny_row, tiny_sample
from tests.train.trainers import SAMPLES, step, weights


def test_four_micro_batches_equal_one(make):
    one, four = make(1), make(4)
    metrics_one = step(one, [tiny_row(SAMPLES)])
    rows = [tiny_row(SAMPLES[i : i + 2]) for i in range(0, 8, 2)]
    metrics_four = step(four, rows)
    assert metrics_one["train/loss"] == pytest.approx(metrics_four["train/loss"], abs=1e-5)
    assert metrics_one["train/grad_norm"] == pytest.approx(metrics_four["train/grad_norm"], rel=1e-4)
    before, after = weights(make(1)), weights(one)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for source in "ab":
        assert metrics_one[f"train/loss/{source}"] == pytest.approx(metrics_four[f"train/loss/{source}"], abs=1e-5)


def test_gradients_of_four_micro_batches_equal_those_of_one(make):
    found = []
    for rows in ([tiny_row(SAMPLES)], [tiny_row(SAMPLES[i : i + 2]) for i in range(0, 8, 2)]):
        trainer = make(len(rows))
        weight = sum(float(row.loss_weights.sum()) for row in rows)
        for row in rows:
            trainer.run_row(row, weight, [], last=row is rows[-1])
        found.append({name: p.grad.clone() for name, p in trainer.engine.model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5), name


def test_layers_that_are_left_out_are_those_of_the_row_whatever_ran_before_it(make):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    rows = [tiny_row([tiny_sample(i, tiles=2, source="a")], number=i) for i in range(4)]
    found = []
    for order in (rows, rows[::-1]):
        trainer = make(1)
        model = trainer.engine.model
        torch.manual_seed(0)
        vit = InternVit(image_size=16, patch_size=8, drop_path=0.5, fan_in_init=True, **sizes)
        model.mixture = ChannelConcat(encoders={"vit": vit})
        model.projector = MlpProjector(model.mixture.channels, 32)
        losses = {row.row: trainer.run_row(row, 1.0, [], last=True)[:, 0].sum().item() for row in order}
        found.append([losses[number] for number in range(4)])
    assert found[0] == found[1]
    assert (
        trainer.run_row(tiny_row([tiny_sample(0, tiles=2, source="a")], number=7), 1.0, [], last=True)[:, 0].sum()
        != found[0][0]
    )


def test_an_empty_row_changes_nothing(make):
    plain, padded = make(1), make(2)
    plain.train_step([tiny_row(SAMPLES)], Throughput())
    padded.train_step([tiny_row(SAMPLES), tiny_row([])], Throughput())
    for name, value in weights(plain).items():
        assert torch.allclose(value, weights(padded)[name], atol=1e-6), name


def test_loss_is_the_weighted_mean_and_source_losses_add_up(make):
    trainer = make(1)
    row = tiny_row(SAMPLES)
    with torch.no_grad():
        losses = trainer.engine.forward(row)
    metrics = step(trainer, [row])
    expected = float((losses * row.loss_weights).sum() / row.loss_weights.sum())
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-6)
    share = {
        source: sum(float(s.loss_weights.sum()) for s in SAMPLES if s.source == source) / float(row.loss_weights.sum())
        for source in "ab"
    }
    assert sum(metrics[f"train/loss/{s}"] * share[s] for s in "ab") == pytest.approx(expected, rel=1e-5)


def test_logged_losses_are_means_since_the_last_log(make):
    trainer = make(1)
    rows = [tiny_row(SAMPLES[:3]), tiny_row(SAMPLES[3:])]
    single = []
    for row in rows:
        other = make(1)
        other.engine.model.load_state_dict(trainer.engine.model.state_dict())
        single.append(step(other, [row])["train/loss"])
        trainer.train_step([row], Throughput())
    sums = [float(row.loss_weights.sum()) for row in rows]
    expected = sum(a * b for a, b in zip(single, sums, strict=True)) / sum(sums)
    assert sum(weight for _, weight in trainer.state.loss_sums.values()) == pytest.approx(sum(sums))
    assert trainer.flush_losses()["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.flush_losses() == trainer.state.loss_sums == {}


def test_the_ledger_holds_what_each_step_used_and_dropped(make, tmp_path):
    error = SampleError("b/x", "unreadable_video", "broken")
    row = pack(SAMPLES[:2], [("b", error)], filler_id=0, tile_size=TILE)
    trainer = make(1, batches=[booked(row, number) for number in range(4)])
    assert trainer.fit()
    assert trainer.state.read == {"a": 0, "b": 12} and trainer.state.cursor["window"] == 3
    records = read_ledger(tmp_path / "ledger", "sft").records
    assert records["step"].tolist() == records["row"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert records["status"].tolist() == [USED, USED, 1 + REASONS.index("unreadable_video")] * 4
    assert records["num_tokens"][:3].tolist() == [len(SAMPLES[0].input_ids), len(SAMPLES[1].input_ids), 0]
    assert [(bad.step, str(bad.error)) for bad in read_bad(tmp_path / "ledger", "sft")] == [
        (step, "b/x: unreadable_video: broken") for step in range(4)
    ]


def test_a_stage_logs_and_saves_when_due_and_waits_for_its_last_checkpoint(make):
    saved, logged, polled = [], [], []
    trainer = make(1, batches=[tiny_row(SAMPLES, number=number) for number in range(4)], saved=saved)
    trainer.save_every = trainer.log_every = 3
    trainer.tracker = SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)))
    trainer.poll = lambda: polled.append(trainer.state.step)
    trainer.state.global_step = 10
    assert trainer.fit()
    assert saved == [False, True] and polled == [1, 2, 3, 4]
    assert [(step, metrics["stage_step"]) for step, metrics in logged] == [(13, 3), (14, 4)]
    tokens = trainer.state.tokens_seen // 4
    assert tokens == tiny_row(SAMPLES).num_tokens
    for (_, metrics), left, done in zip(logged, (1, 0), (3, 4), strict=True):
        assert metrics["time/eta_seconds"] == pytest.approx(left * metrics["time/step_seconds"])
        assert metrics["data/fill"] == pytest.approx(tokens / 256) and metrics["train/tokens_seen"] == done * tokens
        assert 0 < metrics["time/data_wait_share"] < 1 and metrics["time/images_per_second"] > 0


def test_clipping_limits_the_update(make):
    norms = []
    for limit in (None, 1e-3):
        trainer = make(1, max_grad_norm=limit)
        trainer.run_row(tiny_row(SAMPLES), 1.0, [], last=True)
        trainer.engine.optimizer.step = lambda: None
        trainer.engine.optimizer.zero_grad = lambda: None
        _, norm = trainer.engine.step(1.0)
        after = torch.stack([p.grad.norm() for p in trainer.engine.model.parameters()]).norm()
        norms.append((norm, float(after)))
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-5)
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-5) and norms[1][1] == pytest.approx(1e-3, rel=1e-3)


def test_publishing_a_checkpoint_is_no_part_of_a_steps_seconds_and_what_is_profiled_ends_before_it(make):
    """As the convention of MFU says; a large checkpoint that is deleted can take minutes."""
    done = []

    class Meter(Throughput):
        def update(self, **counts):
            done.extend(["measured"] if "step_seconds" in counts else [])
            super().update(**counts)

    class Window:
        def at(self, step):
            done.append(f"begins {step}")

        def done(self, step):
            done.append(f"ends {step}")

    trainer = make(batches=[tiny_row(SAMPLES, number=n) for n in range(4)], num_steps=4)
    trainer.meter, trainer.profiler, trainer.poll = Meter(), Window(), lambda: done.append("published")
    assert trainer.fit()
    assert done == [part for n in range(4) for part in (f"begins {n}", "measured", f"ends {n + 1}", "published")]
