"""A run killed, preempted, or moved to other ranks and workers goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import time

import pytest
import torch

from eagle_train.__main__ import main
from eagle_train.data.shards import write_tars
from eagle_train.data.toy.samples import toy_samples
from eagle_train.model.checkpoints.files import read_weights
from eagle_train.track.jsonl import read_metrics
from eagle_train.train import load
from eagle_train.train.app import train
from eagle_train.train.checkpoint import CheckpointDir, LostCheckpointsError
from eagle_train.train.config import ConfigError
from eagle_train.train.load import export_run, load_model, read_checkpoint_weights
from eagle_train.train.run_folder import read_attempts
from tests.runs import config, losses, must_run, overrides, rows, start

STEPS = 9  # 3 of pretrain, 6 of sft


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The run everything is compared with."""
    run = tmp_path_factory.mktemp("undisturbed")
    assert train(config(data, run))
    assert len(losses(run)) == STEPS
    return run


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


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 4, 8])
def test_a_run_stopped_anywhere_repeats_the_losses_to_the_bit(data, undisturbed, tmp_path, step, monkeypatch):
    run_until(config(data, tmp_path), step, monkeypatch)
    assert train(config(data, tmp_path))
    assert losses(tmp_path) == losses(undisturbed)
    assert rows(tmp_path) == rows(undisturbed)
    assert weights(tmp_path) == weights(undisturbed)


def weights(run):
    state = read_checkpoint_weights(CheckpointDir(run / "checkpoints").latest())
    return {name: tensor.tolist() for name, tensor in state.items()}


def test_workers_change_neither_rows_nor_losses(data, undisturbed, tmp_path, monkeypatch):
    run_until(config(data, tmp_path, "data.num_workers=2"), 5, monkeypatch)
    assert train(config(data, tmp_path, "data.num_workers=1"))
    assert losses(tmp_path) == losses(undisturbed)
    assert rows(tmp_path) == rows(undisturbed)


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
    must_run(arguments)
    assert losses(tmp_path) == losses(undisturbed)
    assert rows(tmp_path) == rows(undisturbed)


@pytest.mark.slow
def test_sigterm_to_all_processes_saves_and_the_next_start_goes_on(data, tmp_path):
    long = ("schedule.sft.num_steps=150", "save_every=1000")  # so that the signal comes in the middle
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
    must_run(arguments)
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [(), ("engine=zero3", "engine.persistence_threshold=100")], ids=["plain", "zero3"])
def test_other_ranks_and_engines_run_the_same_rows(data, tmp_path, monkeypatch, engine):
    four_rows = "schedule.sft.rows_per_step=4"
    assert train(config(data, tmp_path / "whole", four_rows))
    run_until(config(data, tmp_path / "parts", four_rows), 5, monkeypatch)
    must_run(overrides(data, tmp_path / "parts", four_rows, "data.num_workers=1", *engine), ranks=2)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.slow
def test_writing_in_the_background_changes_nothing_and_is_measured(data, undisturbed, tmp_path):
    run, part = tmp_path / "run", tmp_path / "part"
    assert train(config(data, run, "async_save=true", "save_every=1", "keep_last=100"))
    assert losses(run) == losses(undisturbed)
    assert len(CheckpointDir(run / "checkpoints").published()) == STEPS
    saves = [r for r in read_metrics(run / "metrics.jsonl") if "time/checkpoint_stall_seconds" in r]
    assert len(saves) == STEPS and all(r["time/checkpoint_write_seconds"] > 0 for r in saves)
    shutil.copytree(run, part)
    for later in (6, 7, 8, 9):
        shutil.rmtree(part / f"checkpoints/step-{later:08d}")
    assert train(config(data, part, "async_save=true"))  # from one that was written in the background
    assert losses(part) == losses(undisturbed) and weights(part) == weights(undisturbed)


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
def test_an_incomplete_checkpoint_is_skipped_with_a_warning_and_kept(data, undisturbed, tmp_path, caplog, monkeypatch):
    run_until(config(data, tmp_path), 7, monkeypatch)
    newest = CheckpointDir(tmp_path / "checkpoints").latest()
    next(newest.glob("state-*")).write_bytes(b"torn")
    assert train(config(data, tmp_path))
    assert "skipping incomplete checkpoint" in caplog.text and newest.name in caplog.text
    assert losses(tmp_path) == losses(undisturbed)
    assert any(p.name.startswith(f"{newest.name}.replaced") for p in newest.parent.iterdir())


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing_more(data, tmp_path):
    small = config(data, tmp_path, "schedule.sft.num_steps=1")
    assert train(small)
    before = read_metrics(tmp_path / "metrics.jsonl")
    assert train(small)
    assert read_metrics(tmp_path / "metrics.jsonl") == before


@pytest.mark.slow
def test_another_plan_is_refused_with_the_difference_unless_it_is_accepted(data, tmp_path, monkeypatch, caplog):
    run_until(config(data, tmp_path), 6, monkeypatch)
    with pytest.raises(ConfigError, match=r"stopped at step 2 with another plan: plan.seed: 0 -> 1. Its rows"):
        train(config(data, tmp_path, "schedule.sft.seed=1"))
    assert train(config(data, tmp_path, "schedule.sft.seed=1", "accept_changed_plan=true"))
    assert "going on at step 2 of the new plan" in caplog.text
    assert len(losses(tmp_path)) == STEPS


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
def test_changed_data_tokenizer_and_layout_are_named(data, tmp_path, monkeypatch, change, said):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    run_until(config(root, tmp_path / "run"), 6, monkeypatch)
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
        train(config(root, tmp_path / "run", *more))


@pytest.mark.slow
def test_a_failed_start_leaves_the_run_usable(data, undisturbed, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(undisturbed, run)
    with pytest.raises(ValueError, match=r"does not fit this run's model and stage: .*projector"):
        train(config(data, run, "projector.depth=1", "accept_changed_plan=true"))
    assert load_model(run)


@pytest.mark.slow
def test_a_changed_learning_rate_counts_from_the_resume_on(data, tmp_path, monkeypatch, caplog):
    run_until(config(data, tmp_path), 6, monkeypatch)
    assert train(config(data, tmp_path, "schedule.sft.learning_rates.llm=0.5"))
    assert "the config changed" in caplog.text and "schedule.sft.learning_rates.llm" in caplog.text
    rates = {r["step"]: r["lr/llm"] for r in read_metrics(tmp_path / "metrics.jsonl") if "lr/llm" in r}
    assert rates[5] < 1e-3 < rates[7]


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_keeps_its_tracker_id(data, tmp_path, monkeypatch):
    run_until(config(data, tmp_path), 1, monkeypatch)
    assert train(config(data, tmp_path))
    first, second = read_attempts(tmp_path)
    assert first["run_id"] == second["run_id"] and second["resumed_from"] is None
