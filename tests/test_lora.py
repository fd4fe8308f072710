"""Runs with adapters: resumed exactly, the same under ZeRO, exported merged or alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from eagle_train.model.lora import is_adapter
from eagle_train.tools import export, replay
from eagle_train.train.app import train
from eagle_train.train.assemble import add_adapters, build_model
from eagle_train.train.checkpoint import CheckpointDir, seed_everything
from eagle_train.train.config import ConfigError
from eagle_train.train.load import load_model, load_weights, newest_checkpoint, read_checkpoint_weights
from tests.runs import config, losses
from tests.test_resume import run_until

pytestmark = pytest.mark.slow

VIT = {
    "_target_": "eagle_train.model.lora.Lora",
    "rank": 2,
    "alpha": 4,
    "dropout": 0.1,
    "targets": ["q_proj", "v_proj", "mlp.fc1"],
}


def lora_config(data, run, *more, dropout=0.1):
    """Returns the config of a small run with adapters on the LLM and one encoder, the rest trained as usual."""
    made = config(data, run, "lora=internvl2", "lora.llm.rank=4", f"lora.llm.dropout={dropout}", *more)
    return made | {"lora": made["lora"] | {"mixture.encoders.vit": VIT | {"dropout": dropout}}}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A whole run with dropout in its adapters."""
    folder = tmp_path_factory.mktemp("lora")
    assert train(lora_config(data, folder))
    return folder


def trained_weights(run):
    return read_checkpoint_weights(newest_checkpoint(run))


def test_adapters_are_trained_and_the_weights_below_are_not(data, run):
    made = lora_config(data, run)
    seed_everything(made["seed"])
    found, before = trained_weights(run), build_model(made).state_dict()
    changed = set()
    for name, weight in found.items():
        if is_adapter(name):
            assert ".lora_A." in name or weight.any(), name  # B began as 0
        elif not torch.equal(weight, before[name.replace(".base_layer.", ".")]):
            changed.add(name)
    assert any(name.startswith("projector.") for name in changed)
    assert any(name.startswith("mixture.encoders.convnext.") for name in changed)
    assert not [name for name in changed if name.startswith(("llm.", "mixture.encoders.vit."))]


@pytest.mark.slow
def test_a_stopped_run_repeats_losses_and_weights_to_the_bit(data, run, tmp_path):
    """Dropout too: the random state goes on."""
    short = lora_config(data, tmp_path, "schedule.sft.num_steps=6")
    with pytest.MonkeyPatch.context() as patch:
        run_until(short, 5, patch)
    assert train(short)
    assert losses(tmp_path) == losses(run)
    resumed, expected = trained_weights(tmp_path), trained_weights(run)
    assert resumed.keys() == expected.keys() and all(torch.equal(resumed[n], expected[n]) for n in expected)


def test_an_export_has_merged_weights_and_the_same_logits(data, run, tmp_path):
    assert export.main([str(run), "--out", str(tmp_path / "out")]) == 0
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not any("lora" in name or "base_layer" in name for name in names)
    with pytest.raises(ValueError, match="has no adapters of its LLM"):
        export.main([str(tmp_path / "out"), "--adapter"])
    merged, _ = load_model(tmp_path / "out")
    made = lora_config(data, run)
    adapted = build_model(made)
    add_adapters(made, adapted)
    load_weights(adapted, trained_weights(run))
    ids = torch.randint(5, 400, (1, 20))
    found, expected = (m.llm.model(ids, use_cache=False).last_hidden_state for m in (merged, adapted.eval()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(merged.mixture(pixels), adapted.mixture(pixels), atol=1e-5, rtol=1e-5)


def test_the_adapter_alone_is_exported_for_peft(run, tmp_path):
    assert export.main([str(run), "--adapter", "--out", str(tmp_path / "adapter")]) == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 32)
    tensors, trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), trained_weights(run)
    assert len(tensors) == sum(is_adapter(name) and name.startswith("llm.") for name in trained)
    name = "model.layers.1.self_attn.q_proj.lora_B"
    assert torch.equal(tensors[f"base_model.model.{name}.weight"], trained[f"llm.{name}.default.weight"])


def test_adapters_of_another_models_llm_name_no_published_base(data, run, tmp_path):
    """Their weights are those of `init_from`; what `llm.pretrained` names was never read."""
    made = lora_config(
        data, tmp_path / "run", f"init_from={run}", "+llm.pretrained=some/llm", "schedule.sft.num_steps=1"
    )
    assert train(made | {"schedule": {"sft": made["schedule"]["sft"]}})
    assert export.main([str(tmp_path / "run"), "--adapter"]) == 0
    settings = json.loads((tmp_path / "run" / "export-adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None


@pytest.mark.slow
def test_plain_torch_and_zero_2_give_the_same_losses(data, tmp_path):
    for engine in ("plain", "zero2"):
        assert train(lora_config(data, tmp_path / engine, f"engine={engine}", "engine.bf16=false", dropout=0.0))
    assert losses(tmp_path / "zero2") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


def test_a_module_that_is_not_there_is_named(data, tmp_path):
    made = config(data, tmp_path) | {"lora": {"mixture.encoders.vitt": VIT}}
    with pytest.raises(ConfigError, match=r"no module 'mixture.encoders.vitt'; there are llm, .*mixture.encoders.vit"):
        train(made)
    assert not CheckpointDir(tmp_path / "checkpoints").published()


@pytest.mark.parametrize("step", [1, 6])
def test_a_step_is_replayed_with_its_adapters_to_the_bit(run, capsys, step):
    """From the first weights, and from a checkpoint of the same stage."""
    assert replay.main([str(step), str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"]["rebuilt"]["train/loss"] == losses(run)[step - 1]
