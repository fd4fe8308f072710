"""Pre-alignment as a schedule: each encoder in its own stage, then the usual ones."""

import json

import pytest
import torch

from eagle_train.__main__ import main
from eagle_train.train.app import train
from eagle_train.train.assemble import build_model
from eagle_train.train.checkpoint import CheckpointDir, read_state, seed_everything
from eagle_train.train.load import export_run, load_model, read_checkpoint_weights
from tests.runs import config, losses, must_run, overrides, rows
from tests.test_resume import run_until

STAGES = ["prealign_vit", "prealign_convnext", "pretrain", "sft"]


def schedule(data):
    """Returns the overrides of four short stages."""
    short = [f"schedule.{name}.{key}" for name in STAGES[:2] for key in ("max_length=384", "num_steps=3")]
    recipes = [f"schedule.{name}.recipe={data / 'small.yaml'}" for name in STAGES[:2]]
    return ["schedule=prealign_toy", *short, *recipes, "schedule.sft.num_steps=2", "keep_last=20", "save_every=1"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """An undisturbed run."""
    run = tmp_path_factory.mktemp("aligned")
    assert train(config(data, run, *schedule(data)))
    assert len(losses(run)) == 3 + 3 + 3 + 2
    return run


def weights(run):
    """Returns the weights at every step, in order, with the stage they belong to."""
    checkpoints = CheckpointDir(run / "checkpoints").published()
    states = [read_checkpoint_weights(path) for path in checkpoints]
    return [(read_state(path).stage, state) for path, state in zip(checkpoints, states, strict=True)]


def changed(before, after):
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


@pytest.mark.slow
def test_each_stage_changes_its_encoder_and_leaves_the_rest_untouched_to_the_bit(data, run):
    seed_everything(0)
    before = build_model(config(data, run, *schedule(data))).state_dict()
    steps = weights(run)
    assert list(dict(steps)) == STAGES
    for name in STAGES[:2]:
        of_stage = [state for stage, state in steps if stage == name]
        encoder = f"mixture.encoders.{name.removeprefix('prealign_')}."
        found = changed(before, of_stage[-1])
        assert found and all(weight.startswith(encoder) for weight in found)
        aligner = {weight for weight in of_stage[0] if weight.startswith("aligner.")}
        assert aligner and aligner <= changed(of_stage[0], of_stage[-1])
        before = {weight: value for weight, value in of_stage[-1].items() if weight not in aligner}
    before = [state for stage, state in steps if stage == "pretrain"][-1]
    aligned = [state for stage, state in steps if stage == STAGES[1]][-1]
    assert not any(name.startswith("aligner.") for name in before)
    found = changed(aligned, before)
    assert found and all(name.startswith("projector.") for name in found)


@pytest.mark.slow
def test_a_run_stopped_in_stages_of_pre_alignment_repeats_to_the_bit(data, run, tmp_path, monkeypatch):
    settings = config(data, tmp_path, *schedule(data))
    run_until(settings, 3, monkeypatch)  # the last step of the first stage, not saved
    run_until(settings, 5, monkeypatch)
    # What a run that is still aligning has can be loaded and exported.
    model, _ = load_model(tmp_path)
    exported, _ = load_model(export_run(tmp_path, tmp_path / "export"))
    assert not changed(model.state_dict(), exported.state_dict())
    assert train(settings)
    assert losses(tmp_path) == losses(run)
    assert rows(tmp_path) == rows(run)
    (_, ours), (_, theirs) = weights(tmp_path)[-1], weights(run)[-1]
    assert ours.keys() == theirs.keys() and not changed(ours, theirs)


@pytest.mark.slow
@pytest.mark.slow
def test_plan_shows_the_aligner_of_every_stage(data, tmp_path, capsys):
    arguments = ["plan", *overrides(data, tmp_path, *schedule(data))]
    assert main([*arguments, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["name"] for stage in stages] == STAGES
    for stage in stages[:2]:
        modules = stage["parameters"]["modules"]
        encoder = f"mixture.encoders.{stage['name'].removeprefix('prealign_')}"
        assert {name for name, module in modules.items() if module["trainable"]} == {encoder, "aligner"}
        assert modules["aligner"]["trainable"] == modules["aligner"]["total"] > 0
    assert all("aligner" not in stage["parameters"]["modules"] for stage in stages[2:])
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("aligner") == 2


@pytest.mark.slow
def test_the_command_line_runs_all_stages_under_zero_3_too(data, run, tmp_path):
    must_run(overrides(data, tmp_path, *schedule(data), "engine=zero3", "engine.persistence_threshold=0"), ranks=2)
    assert losses(tmp_path) == pytest.approx(losses(run), abs=1e-5)
