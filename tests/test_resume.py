"""A run killed, preempted, or moved to other ranks and workers goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import time

import pytest
import torch

from eagle_train.__main__ import main
from eagle_train.data.plan import PLAN_VERSION
from eagle_train.data.shards import write_tars
from eagle_train.data.toy.samples import toy_samples
from eagle_train.model.checkpoints.files import read_weights
from eagle_train.track.jsonl import read_metrics
from eagle_train.train import load, stage_data
from eagle_train.train.app import train
from eagle_train.train.checkpoint import CheckpointDir, LostCheckpointsError
from eagle_train.train.config import ConfigError
from eagle_train.train.load import export_run, load_model, read_checkpoint_weights
from eagle_train.train.run_folder import read_attempts
from tests.runs import config, losses, must_run, overrides, rows, start

STEPS = 9  # 3 of pretrain, 6 of sft


class Stop(Exception):
    """Ends a run in the middle, like a kill: nothing is saved."""


def run_until(config, step, monkeypatch):
    """Trains, and fails when `step` global steps are done."""
    from eagle_train.track.jsonl import JsonlTracker

    log = JsonlTracker.log

    def fail(self, metrics, at):
        log(self, metrics, at)
        if at == step:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(JsonlTracker, "log", fail)
        train(config)


def killed_after(checkpoint, run, into):
    """Returns a copy of a run as a kill leaves it: with records of steps after its newest checkpoint."""
    shutil.copytree(run, into)
    for later in CheckpointDir(into / "checkpoints").published():
        if int(later.name.rpartition("-")[2]) > checkpoint:
            shutil.rmtree(later)
    assert int(CheckpointDir(into / "checkpoints").latest().name.rpartition("-")[2]) == checkpoint
    return into


def weights(run):
    state = read_checkpoint_weights(CheckpointDir(run / "checkpoints").latest())
    return {name: tensor.tolist() for name, tensor in state.items()}


@pytest.mark.slow
def test_a_run_stopped_again_and_again_repeats_the_losses_to_the_bit(data, undisturbed, tmp_path, monkeypatch):
    # Before the first checkpoint, before and after the one at the end of a stage, and within the last stage.
    for step in (1, 3, 4, 8):
        run_until(config(data, tmp_path), step, monkeypatch)
    assert train(config(data, tmp_path))
    assert losses(tmp_path) == losses(undisturbed)
    assert rows(tmp_path) == rows(undisturbed)
    assert weights(tmp_path) == weights(undisturbed)
    starts = read_attempts(tmp_path)
    assert len({start["run_id"] for start in starts}) == 1, "one id from before the first checkpoint on"
    resumed = [start["resumed_from"] for start in starts]
    assert resumed == [None, None, "step-00000002", "step-00000003", "step-00000007"]


def test_a_resumed_run_repeats_the_losses_to_the_bit_whatever_its_workers(data, undisturbed, tmp_path):
    run = killed_after(5, undisturbed, tmp_path / "run")
    assert train(config(data, run, "data.num_workers=2"))
    assert losses(run) == losses(undisturbed)
    assert rows(run) == rows(undisturbed)
    assert weights(run) == weights(undisturbed)
    assert read_attempts(run)[-1]["resumed_from"] == "step-00000005"


@pytest.mark.slow
def test_killed_with_sigkill_the_same_command_repeats_the_run(data, undisturbed, tmp_path):
    arguments = overrides(data, tmp_path, "async_save=true", "save_every=1")
    process = start(arguments)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert main(arguments) == 0  # from a checkpoint that was written in the background
    assert losses(tmp_path) == losses(undisturbed)
    assert rows(tmp_path) == rows(undisturbed)
    assert weights(tmp_path) == weights(undisturbed)


@pytest.mark.slow
def test_sigterm_to_all_processes_saves_and_the_next_start_goes_on(data, tmp_path):
    long = ("schedule.sft.num_steps=60", "save_every=1000")  # so that the signal comes in the middle
    assert train(config(data, tmp_path / "whole", *long))
    run = tmp_path / "parts"
    arguments = overrides(data, run, *long, "data.num_workers=1")
    process = start(arguments)
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers do: loader workers get it too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "state saved" in stderr
    assert main(arguments) == 0
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_other_ranks_and_another_engine_run_the_same_rows(data, tmp_path):
    four_rows = "schedule.sft.rows_per_step=4"
    assert train(config(data, tmp_path / "whole", four_rows))
    parts = killed_after(5, tmp_path / "whole", tmp_path / "parts")
    sharded = ("engine=zero3", "engine.persistence_threshold=100")
    must_run(overrides(data, parts, four_rows, "data.num_workers=1", *sharded), ranks=2)
    assert rows(parts) == rows(tmp_path / "whole")
    assert losses(parts) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert [start["ranks"] for start in read_attempts(parts)] == [1, 2]


@pytest.mark.slow
def test_writing_in_the_background_changes_nothing_and_is_measured(data, undisturbed, tmp_path):
    assert train(config(data, tmp_path, "async_save=true", "save_every=1", "keep_last=100"))
    assert losses(tmp_path) == losses(undisturbed) and weights(tmp_path) == weights(undisturbed)
    assert len(CheckpointDir(tmp_path / "checkpoints").published()) == STEPS
    saves = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "time/checkpoint_stall_seconds" in r]
    assert len(saves) == STEPS and all(r["time/checkpoint_write_seconds"] > 0 for r in saves)


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_stops_until_told_to_start_anew(data, undisturbed, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(undisturbed, run)
    for file in run.glob("checkpoints/*/state-*"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(LostCheckpointsError, match=r"no checkpoint is whole: .* is damaged: .*accept_lost_checkpoints"):
        train(config(data, run))
    assert losses(run) == losses(undisturbed), "nothing was touched"
    assert train(config(data, run, "accept_lost_checkpoints=true"))
    assert losses(run) == losses(undisturbed) and len(read_attempts(run)) == 2


@pytest.mark.slow
def test_a_run_goes_on_when_a_save_fails_and_stops_when_its_end_cannot_be_saved(
    data, undisturbed, tmp_path, monkeypatch, caplog
):
    begin = CheckpointDir.begin

    def full_at(*steps):
        def fail(self, step):
            if step in steps:
                raise OSError(28, "No space left on device")
            return begin(self, step)

        monkeypatch.setattr(CheckpointDir, "begin", fail)

    full_at(5, 9)
    with pytest.raises(OSError, match=r"stage sft is trained, but its end could not be saved: .*No space left"):
        train(config(data, tmp_path))
    assert "the checkpoint of step 5 could not be saved" in caplog.text
    assert [path.name[-1] for path in CheckpointDir(tmp_path / "checkpoints").published()] == ["2", "3", "7"]
    full_at()
    assert train(config(data, tmp_path))
    assert losses(tmp_path) == losses(undisturbed) and weights(tmp_path) == weights(undisturbed)


@pytest.mark.slow
def test_any_checkpoint_of_a_run_is_exported_with_a_check_of_its_logits(
    data, undisturbed, tmp_path, capsys, monkeypatch
):
    newest, earlier = export_run(undisturbed, tmp_path / "newest"), tmp_path / "earlier"
    assert main(["export", str(undisturbed), "--out", str(earlier), "--checkpoint", "5", "--check"]) == 0
    for folder, step in ((newest, 9), (earlier, 5)):
        saved = read_checkpoint_weights(undisturbed / f"checkpoints/step-{step:08d}")
        written = read_weights(folder)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in written.items())
    assert main(["export", str(undisturbed), "--out", str(tmp_path / "no"), "--checkpoint", "4"]) == 1
    assert "no checkpoint of step 4; there are those of steps 5, 7, 9" in capsys.readouterr().err
    write = load.write_export

    def wrong(out, config, weights, shard_bytes):
        bias = "projector.layers.0.bias"
        write(out, config, dict(weights) | {bias: weights[bias] + 1}, shard_bytes)

    monkeypatch.setattr(load, "write_export", wrong)
    with pytest.raises(ValueError, match="gives other logits than the checkpoint: they differ by up to"):
        export_run(undisturbed, tmp_path / "no")
    export_run(undisturbed, tmp_path / "unchecked", check=False)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_skipped_with_a_warning_and_kept(data, undisturbed, tmp_path, caplog):
    run = killed_after(7, undisturbed, tmp_path / "run")
    newest = CheckpointDir(run / "checkpoints").latest()
    next(newest.glob("state-*")).write_bytes(b"torn")
    assert train(config(data, run))
    assert "skipping incomplete checkpoint" in caplog.text and newest.name in caplog.text
    assert losses(run) == losses(undisturbed)
    assert any(p.name.startswith(f"{newest.name}.damaged") for p in newest.parent.iterdir())


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing_more(data, undisturbed, tmp_path):
    run = killed_after(STEPS, undisturbed, tmp_path / "run")
    assert train(config(data, run))
    for file in ("metrics.jsonl", "accounting.json"):
        assert (run / file).read_bytes() == (undisturbed / file).read_bytes()
    assert len(read_attempts(run)) == 2


@pytest.mark.slow
def test_another_plan_is_refused_with_the_difference_unless_it_is_accepted(data, undisturbed, tmp_path, caplog):
    run = killed_after(5, undisturbed, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"stopped at step 2 with another plan: plan.seed: 0 -> 1. Its rows"):
        train(config(data, run, "schedule.sft.seed=1"))
    assert train(config(data, run, "schedule.sft.seed=1", "accept_changed_plan=true"))
    assert "going on at step 2 of the new plan" in caplog.text
    assert len(losses(run)) == STEPS


@pytest.mark.slow
def test_rows_of_another_version_of_the_plan_are_refused(data, undisturbed, tmp_path, monkeypatch):
    run = killed_after(5, undisturbed, tmp_path / "run")
    monkeypatch.setattr(stage_data, "PLAN_VERSION", PLAN_VERSION + 1)
    told = rf"stopped at step 2 with another plan: plan.version: {PLAN_VERSION} -> {PLAN_VERSION + 1}. Its rows"
    with pytest.raises(ConfigError, match=told):
        train(config(data, run))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.max_length", r"layout.max_length: 384 -> 400"),
        ("tokenizer", r"layout.tokenizer: \w+ -> \w+"),
        ("shard", r"data.small_text.small_text-000001.tar: 2 samples, .* -> 2 samples, "),
        ("quarantine", r"data.small_shapes.small_shapes-000000.tar: 10 samples, .* 1 quarantined"),
    ],
)
def test_changed_data_tokenizer_and_layout_are_named(data, undisturbed, tmp_path, change, said):
    root, run = tmp_path / "data", killed_after(5, undisturbed, tmp_path / "run")
    shutil.copytree(data, root)
    more = []
    if change == "data.max_length":
        more = ["schedule.sft.max_length=400"]
    elif change == "tokenizer":
        file = root / "tokenizer" / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "NFC"}}))
    elif change == "shard":
        shard = root / "small_text" / "small_text-000001.tar"
        write_tars(list(toy_samples("text", "train", 12, seed=0))[:2], iter([shard]))
    else:
        (tmp_path / "list").write_text("small_shapes/small_shapes-000000/shapes-train-000003\n")
        more = [f"data.quarantine={tmp_path / 'list'}"]
    with pytest.raises(ConfigError, match=said):
        train(config(root, run, *more))


@pytest.mark.slow
def test_a_failed_start_leaves_the_run_usable(data, undisturbed, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(undisturbed, run)
    with pytest.raises(ValueError, match=r"does not fit this run's model and stage: .*projector"):
        train(config(data, run, "projector.depth=1", "accept_changed_plan=true"))
    assert load_model(run)


@pytest.mark.slow
def test_a_changed_learning_rate_counts_from_the_resume_on(data, undisturbed, tmp_path, caplog):
    run = killed_after(5, undisturbed, tmp_path / "run")
    assert train(config(data, run, "schedule.sft.learning_rates.llm=0.5"))
    assert "the config changed" in caplog.text and "schedule.sft.learning_rates.llm" in caplog.text
    rates = {r["step"]: r["lr/llm"] for r in read_metrics(run / "metrics.jsonl") if "lr/llm" in r}
    assert rates[5] < 1e-3 < rates[7]
