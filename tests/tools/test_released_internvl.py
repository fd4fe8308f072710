"""A published InternVL2 checkpoint is imported, used, and exported to the same bits, in both layouts."""

import json

import pytest
import torch
from PIL import Image
from transformers import InternVLForConditionalGeneration

from eagle_train.__main__ import main
from eagle_train.model.checkpoints import internvl
from eagle_train.model.checkpoints.files import read_weights, same, write_weights
from eagle_train.train.app import train
from eagle_train.train.config import load_config
from eagle_train.train.export_internvl import export_native, export_original
from eagle_train.train.load import CARRIED, load_model
from eagle_train.train.released_internvl import import_config
from tests.configs import untrained
from tests.eagle1_layout import random_weights
from tests.internvl_layout import (
    CASES,
    TINY_LLM,
    TOKENS,
    imported,
    original_config,
    original_shapes,
    write_original,
    written,
)
from tests.runs import overrides


@pytest.fixture(params=[pytest.param(case, marks=() if case == "internlm2" else pytest.mark.slow) for case in CASES])
def original(request, data, tmp_path):
    changes = CASES[request.param]
    return written(data, tmp_path / "InternVL2-Tiny", **changes)


@pytest.fixture
def plain(data, tmp_path):
    return written(data, tmp_path / "InternVL2-Tiny")


def equal(folder, other):
    """Whether two checkpoints hold the same names and bits."""
    theirs, ours = read_weights(folder), read_weights(other)
    return theirs.keys() == ours.keys() and all(same(ours[key], tensor) for key, tensor in theirs.items())


def test_the_original_layout_comes_back_to_the_bit(original, tmp_path):
    done = imported(original, tmp_path / "ours")
    assert done.match.unused == [] and done.towers == ("intern_vit",)
    assert export_original(tmp_path / "ours", tmp_path / "back") == []
    assert equal(original, tmp_path / "back")
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "back"))
    for name, value in theirs.items():
        told = {key: ours[name][key] for key in value} if isinstance(value, dict) else ours[name]
        assert told == value, name
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_transformers_layout_comes_back_to_the_bit(original, tmp_path):
    imported(original, tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "native")
    imported(tmp_path / "native", tmp_path / "again")
    assert equal(tmp_path / "ours", tmp_path / "again")
    export_native(tmp_path / "again", tmp_path / "back")
    assert equal(tmp_path / "native", tmp_path / "back")
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("native", "back"))
    assert theirs == ours


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tied", "phi3"])
def test_a_model_that_transformers_saved_from_memory_comes_back_to_the_bit(data, tmp_path, case):
    """Its names are those of the modules, as a plain torch.save of it has them."""
    imported(written(data, tmp_path / "original", **CASES[case]), tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "native")
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native", dtype="auto")
    memory = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.startswith("model.vision_tower.") for name in memory) and "lm_head.weight" in memory
    for path in (tmp_path / "native").glob("*.safetensors*"):
        path.unlink()
    write_weights(tmp_path / "native", memory)
    imported(tmp_path / "native", tmp_path / "of_memory")
    of_memory, ours = read_weights(tmp_path / "of_memory"), read_weights(tmp_path / "ours")
    assert ours.keys() == of_memory.keys() and all(same(of_memory[key], tensor) for key, tensor in ours.items())


@pytest.mark.slow
def test_a_model_that_was_trained_here_leaves_in_both_layouts_and_comes_back(data, tmp_path, capsys):
    run = tmp_path / "run"
    kept = [o for o in overrides(data, run) if not o.startswith("mixture.")]
    tokens = ",".join(f"'{token}'" for token in TOKENS)
    own = [
        f"new_tokens=[{tokens}]",
        "llm.vocab_size=523",
        "chat_template=hermes2",
        "data=internvl",
        "data.tile_size=64",
        "data.tiling.max_tiles=2",
    ]
    vit = "mixture.encoders.intern_vit"
    small = [f"{vit}.hidden_size=16", f"{vit}.intermediate_size=16", f"{vit}.num_attention_heads=2"]
    short = ["schedule.pretrain.num_steps=1", "schedule.sft.num_steps=1"]
    kept = [o for o in kept if not o.startswith("data.tile_size")]
    config = load_config([*kept, "mixture=toy_internvl2", "projector=eagle2", *own, *small, *short])
    assert train(config)
    trained, _ = load_model(run)
    capsys.readouterr()
    for layout in ("internvl", "internvl-hf"):
        assert main(["export", str(run), "--layout", layout]) == 0
        assert capsys.readouterr().err == ""
        out, again = run / f"export-{layout}", tmp_path / layout
        assert main(["import", str(out), str(again)]) == 0
        assert "encoders intern_vit" in capsys.readouterr().out
        ours = read_weights(again)
        assert all(torch.equal(ours[name], tensor) for name, tensor in trained.state_dict().items())
    Image.new("RGB", (100, 40), "red").save(tmp_path / "red.png")
    asked = ["chat", str(tmp_path / "internvl"), "What is it?", "--image", str(tmp_path / "red.png")]
    assert main([*asked, "--max-new-tokens", "3"]) == 0


def test_a_checkpoint_that_does_not_fit_is_refused_with_every_reason(data, tmp_path):
    config, weights = original_config(TINY_LLM), random_weights(original_shapes(TINY_LLM))
    del weights["vision_model.encoder.layers.0.ls1"]
    weights["mlp2.weight"] = torch.zeros(3)
    folder = write_original(tmp_path / "r", config, weights, data)
    with pytest.raises(ValueError, match=r"1 missing: vision_model.encoder.layers.0.ls1.*without a place.*mlp2.weight"):
        imported(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ps_version": "v1"}, "ps_version 'v1' is not supported"),
        ({"template": "unheard-of"}, "template 'unheard-of' is not known"),
        ({"select_layer": -2}, "'select_layer': -2"),
        ({"force_image_size": 448}, "force_image_size is 448"),
        ({"downsample_ratio": 0.4}, "not 1 over a whole number"),
    ],
)
def test_what_the_layout_cannot_be_read_as_is_named(plain, change, said):
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=said):
        import_config(plain)


def test_other_models_are_refused_with_every_reason(data, tmp_path):
    toy = untrained(data, tmp_path / "toy")
    for export in (export_original, export_native):
        with pytest.raises(ValueError, match=r"encoders are vit \(ClipVit\).*of its own.*not a norm and two"):
            export(toy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_imported_without_its_config_is_exported_as_the_release(plain, tmp_path):
    imported(plain, tmp_path / "ours")
    (tmp_path / "ours" / CARRIED / "config.json").unlink()  # as of a model that was trained here from the start
    export_original(tmp_path / "ours", tmp_path / "back")
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (plain, tmp_path / "back"))
    theirs["llm_config"].pop("unheard_of")
    theirs.pop("unheard_of")
    theirs.pop("auto_map")
    for name, value in theirs.items():
        told = {key: ours[name][key] for key in value} if isinstance(value, dict) else ours[name]
        assert told == value, name
    assert ours["auto_map"]["AutoModel"] == "OpenGVLab/InternVL2-1B--modeling_internvl_chat.InternVLChatModel"


def test_a_tied_head_is_written_for_code_that_unties_it(data, tmp_path):
    imported(written(data, tmp_path / "original", tied=True), tmp_path / "ours")
    (tmp_path / "ours" / CARRIED / "config.json").unlink()  # as of a model that was trained here from the start
    export_original(tmp_path / "ours", tmp_path / "back")
    weights = read_weights(tmp_path / "back")
    assert same(weights["language_model.lm_head.weight"], weights["language_model.model.embed_tokens.weight"])
    imported(tmp_path / "back", tmp_path / "again")
    assert load_model(tmp_path / "again")[0].llm.config.tie_word_embeddings
    ours, again = read_weights(tmp_path / "ours"), read_weights(tmp_path / "again")
    assert ours.keys() == again.keys() and all(same(again[name], tensor) for name, tensor in ours.items())


def test_names_of_both_layouts_are_told_apart():
    assert internvl.is_native(["model.vision_tower.x"]) and internvl.is_native(["multi_modal_projector.x"])
    assert not internvl.is_native(["vision_model.embeddings.class_embedding", "language_model.model.norm.weight"])
