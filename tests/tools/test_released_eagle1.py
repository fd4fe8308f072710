"""A released Eagle 1 checkpoint is imported, used, trained from, and exported to the same bits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from eagle_train.__main__ import main
from eagle_train.model.checkpoints.eagle1_config import write_config
from eagle_train.model.checkpoints.files import read_weights, same, write_weights
from eagle_train.model.embeddings import Vocabulary
from eagle_train.train import released_eagle1
from eagle_train.train.load import export_run, load_model, read_config
from eagle_train.train.pretrained import load_start
from eagle_train.train.released_eagle1 import export_projector, export_released, import_config, import_released
from tests.configs import untrained
from tests.eagle1_layout import (
    LLAMA3_8B,
    SHALLOW,
    SHALLOW_ENCODERS,
    TINY,
    TINY_ENCODERS,
    TINY_LLM,
    VICUNA_13B,
    X4,
    X5,
    X5_OF_THE_SCRIPTS,
    random_weights,
    released_config,
    released_shapes,
)

TINY_CHANNELS = {"clip-448": 16, "convnext-1024": 16, "sam-1024": 16, "pix2struct-1024": 16, "det-1024": 64}
UNUSED = 2 + 4 + 4 + 3 * 2  # CLIP's norm, ConvNeXt's head, EVA-02's tables of tower and blocks


def shrunk(config, encoders, llm):
    """Returns a config with encoders of other sizes and a tokenizer's small vocabulary."""
    nodes = {name: node | encoders[name] for name, node in config["mixture"]["encoders"].items()}
    return config | {"mixture": config["mixture"] | {"encoders": nodes}, "llm": config["llm"] | llm}


def write_release(folder, weights, towers=X5, llm=VICUNA_13B, tokenizer=None):
    """Writes a release in three shards; the sizes in its config.json are those of a full LLM."""
    write_weights(folder, weights, shard_bytes=sum(t.nbytes for t in weights.values()) // 3 + 1)
    (folder / "config.json").write_text(json.dumps(released_config(towers, llm)))
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def tiny_weights(towers, seed=0):
    channels = sum(TINY_CHANNELS[name] for name in towers.split(";"))
    return random_weights(released_shapes(towers, TINY_LLM, TINY, channels), seed)


def tiny_config(folder):
    return shrunk(import_config(folder), TINY_ENCODERS, TINY_LLM)


@pytest.fixture(params=[X5, X4, X5_OF_THE_SCRIPTS], ids=["x5", "x4", "x5-other-order"])
def release(request, data, tmp_path):
    folder = tmp_path / "Eagle-Tiny"
    return write_release(folder, tiny_weights(request.param), request.param, tokenizer=data / "tokenizer")


@pytest.fixture
def x4(data, tmp_path):
    """The smallest, for what does not depend on the encoders; it has every kind of unused tensor."""
    return write_release(tmp_path / "Eagle-Tiny", tiny_weights(X4), X4, tokenizer=data / "tokenizer")


@pytest.mark.slow
def test_import_and_export_give_back_every_bit(release, tmp_path):
    done = import_released(release, tmp_path / "ours", tiny_config(release))
    assert len(done.match.unused) == UNUSED and done.strays == []
    warnings = export_released(tmp_path / "ours", tmp_path / "back")
    assert warnings, "a tiny model is not what the original code builds"
    ours, back = read_weights(release), read_weights(tmp_path / "back")
    assert ours.keys() == back.keys() and all(same(back[key], tensor) for key, tensor in ours.items())
    original, written = (json.loads((f / "config.json").read_text()) for f in (release, tmp_path / "back"))
    sizes = TINY_LLM.keys() | {"mm_hidden_size"}  # the release claims those of the full model
    assert {k: written[k] for k in original if k not in sizes} == {k: v for k, v in original.items() if k not in sizes}
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (release / "tokenizer.json").read_bytes()


def test_the_generation_config_comes_back(x4, tmp_path):
    """It may tell more than the `config.json` that transformers would make one of."""
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.2, "pad_token_id": 0}
    (x4 / "generation_config.json").write_text(json.dumps(generation))
    import_released(x4, tmp_path / "ours", tiny_config(x4))
    export_released(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == generation


def test_several_end_tokens_leave_one_padding_token():
    llm = LlamaConfig(**TINY_LLM, eos_token_id=[7, 8]).to_dict()
    written = write_config(llm, {}, depth=2, dtype="bfloat16", max_length=64, original={})
    assert (written["pad_token_id"], written["eos_token_id"]) == (7, [7, 8])
    LlamaConfig.from_dict(written | {"model_type": "llama"})


@pytest.mark.slow
def test_the_imported_model_has_the_released_values_in_config_order(release, tmp_path):
    import_released(release, tmp_path / "ours", tiny_config(release))
    model, _ = load_model(tmp_path / "ours")
    weights = read_weights(release)
    names = json.loads((release / "config.json").read_text())["mm_vision_tower"].split(";")
    expected = {"clip-448": "clip", "convnext-1024": "convnext", "sam-1024": "sam"}
    expected |= {"pix2struct-1024": "pix2struct", "det-1024": "det"}
    assert list(model.mixture.encoders) == [expected[name] for name in names]
    for name, ours, theirs in (
        ("clip-448", "vit.pre_layrnorm.bias", "vision_model.pre_layrnorm.bias"),
        ("convnext-1024", "stages.2.blocks.1.gamma", "stages.2.blocks.1.weight"),
        ("det-1024", "blocks.1.attn.v_proj.bias", "blocks.1.attn.v_bias"),
        ("det-1024", "blocks.1.mlp.fc1_g.weight", "blocks.1.mlp.w1.weight"),
        ("pix2struct-1024", "vit.layernorm.weight", "layernorm.weight"),
    ):
        found = model.mixture.encoders[expected[name]].get_parameter(ours)
        key = f"model.vision_tower.vision_towers.{names.index(name)}.vision_tower.{theirs}"
        assert torch.equal(found, weights[key].float())
    assert torch.equal(model.projector.layers[2].weight, weights["model.mm_projector.2.weight"].float())
    assert torch.equal(model.llm.lm_head.weight, weights["lm_head.weight"].float())


@pytest.mark.slow
def test_transformers_reads_the_exported_llm(x4, tmp_path):
    import_released(x4, tmp_path / "ours", tiny_config(x4))
    export_released(tmp_path / "ours", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text()) | {"model_type": "llama"}
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "back", config=LlamaConfig.from_dict(config), dtype="float32")
    ours, _ = load_model(tmp_path / "ours")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.llm(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_a_release_is_not_taken_for_an_import(x4, capsys):
    assert main(["chat", str(x4), "hello"]) == 1
    assert "`import` reads released checkpoints" in capsys.readouterr().err


@pytest.mark.slow
def test_without_the_original_unused_parts_are_written_neutral(x4, tmp_path):
    import_released(x4, tmp_path / "ours", tiny_config(x4))
    shutil.rmtree(tmp_path / "ours/released")
    export_released(tmp_path / "ours", tmp_path / "back")
    ours, back = read_weights(x4), read_weights(tmp_path / "back")
    shapes = [{key: (t.shape, t.dtype) for key, t in weights.items()} for weights in (ours, back)]
    assert shapes[0] == shapes[1]
    differing = [key for key in ours if not same(ours[key], back[key])]
    assert len(differing) == UNUSED
    assert all(not back[key].any() for key in back if "head.fc" in key)


@pytest.mark.slow
def test_torch_files_import_like_safetensors(x4, tmp_path):
    weights = read_weights(x4)
    for path in x4.glob("model*"):
        path.unlink()
    keys = list(weights)
    for i in (0, 1):
        torch.save({key: weights[key].clone() for key in keys[i::2]}, x4 / f"pytorch_model-{i}.bin")
    weight_map = {key: f"pytorch_model-{i % 2}.bin" for i, key in enumerate(keys)}
    (x4 / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    import_released(x4, tmp_path / "ours", tiny_config(x4))
    export_released(tmp_path / "ours", tmp_path / "back")
    back = read_weights(tmp_path / "back")
    assert all(same(back[key], tensor) for key, tensor in weights.items())


@pytest.fixture
def tiny_command(monkeypatch):
    """Lets the command import tiny checkpoints."""
    monkeypatch.setattr(released_eagle1, "import_config", lambda folder, experiment: tiny_config(folder))


@pytest.mark.slow
def test_the_command_imports_and_its_import_answers(data, tmp_path, tiny_command, capsys):
    release = write_release(tmp_path / "Eagle-Tiny", tiny_weights(X4), X4, tokenizer=data / "tokenizer")
    (release / "model-00001-of-00003_old.safetensors").write_bytes(b"stray")
    assert main(["import", str(release), str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "encoders clip, convnext, pix2struct, det" in said
    assert f"not used by the model: {UNUSED} tensors (blocks, head, rope_glb, rope_win, vision_model)" in said
    assert "not read: model-00001-of-00003_old.safetensors" in said
    assert read_config(tmp_path / "ours")["name"] == "Eagle-Tiny"
    assert main(["chat", str(tmp_path / "ours"), "hello", "--max-new-tokens", "3"]) == 0
    assert main(["export", str(tmp_path / "ours"), "--layout", "eagle1", "--out", str(tmp_path / "back")]) == 0
    said = capsys.readouterr()
    assert said.out.strip().endswith(str(tmp_path / "back")) and "clip-448 has" in said.err
    again = ["import", str(release), str(tmp_path / "ours")]
    assert main(again) == 1 and "is not empty" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda w: w.update({"model.image_newline": torch.zeros(8)}), "without a place in the model: model.image_newl"),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind(tmp_path, tiny_command, change, said, capsys):
    weights = tiny_weights(X4)
    change(weights)
    release = write_release(tmp_path / "Eagle-Tiny", weights, X4)
    assert main(["import", str(release), str(tmp_path / "ours")]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("llm", "experiment", "said"),
    [
        ({"vocab_size": 777}, (), "which template a vocabulary of 777 tokens uses is not known; give --experiment"),
        ({}, ("--experiment", "eagle-x5-13bb"), "did you mean 'eagle-x5-13b'"),
        ({}, ("--experiment", "eagle-x4-7b"), "no encoders ['sam']"),
    ],
)
def test_a_config_that_cannot_be_made_is_explained(tmp_path, llm, experiment, said, capsys):
    release = write_release(tmp_path / "r", {"w": torch.zeros(1)}, X5, VICUNA_13B | llm)
    assert main(["import", str(release), str(tmp_path / "ours"), *experiment]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_without_config_is_no_release(tmp_path, capsys):
    assert main(["import", str(tmp_path), str(tmp_path / "ours")]) == 1
    assert "it has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("llm", "template"), [(VICUNA_13B, "ASSISTANT:"), (LLAMA3_8B, "<|start_header_id|>assistant<|end_header_id|>\n\n")]
)
def test_the_template_follows_the_kind_of_llm(tmp_path, llm, template):
    config = import_config(write_release(tmp_path / "r", {"w": torch.zeros(1)}, X5, llm))
    assert config["chat_template"]["prefix"]["assistant"] == template
    assert config["llm"]["vocab_size"] == llm["vocab_size"]


def test_the_layout_refuses_a_model_it_cannot_hold_with_every_reason(data, tmp_path):
    with pytest.raises(ValueError, match="the mixture has parameters of its own"):
        export_released(untrained(data, tmp_path / "toy"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_projector_alone_leaves_and_comes_back(x4, tmp_path):
    import_released(x4, tmp_path / "ours", tiny_config(x4))
    export_projector(tmp_path / "ours", tmp_path / "stage1")
    written = torch.load(tmp_path / "stage1/mm_projector.bin", weights_only=True)
    expected = {key: t for key, t in read_weights(x4).items() if "mm_projector" in key}
    assert written.keys() == expected.keys() and all(same(written[key], t) for key, t in expected.items())
    assert json.loads((tmp_path / "stage1/config.json").read_text())["tune_mm_mlp_adapter"] is True
    model, _ = load_model(tmp_path / "ours")
    for encoder in model.mixture.encoders.values():
        encoder.pretrained = None
    torch.nn.init.zeros_(model.projector.layers[0].weight)
    model.projector.pretrained = str(tmp_path / "stage1")
    vocabulary = Vocabulary(num_tokens=model.llm.config.vocab_size)
    starts = {start.component: start for start in load_start(model, None, vocabulary)}
    assert starts["projector"].loaded == 4 and starts["projector"].fresh == ()
    assert torch.equal(model.projector.layers[0].weight, expected["model.mm_projector.0.weight"].float())


@pytest.mark.slow
def test_full_width_comes_back_to_the_bit(tmp_path, data):
    llm = VICUNA_13B | {"num_hidden_layers": 1}
    weights = random_weights(released_shapes(X5, llm, SHALLOW, 7680))
    release = write_release(tmp_path / "Eagle-Shallow", weights, tokenizer=data / "tokenizer")
    del weights
    import_released(release, tmp_path / "ours", shrunk(import_config(release), SHALLOW_ENCODERS, llm))
    export_released(tmp_path / "ours", tmp_path / "back")
    ours, back = read_weights(release), read_weights(tmp_path / "back")
    assert ours.keys() == back.keys() and all(same(back[key], tensor) for key, tensor in ours.items())
    for folder in (release, tmp_path / "ours", tmp_path / "back"):  # 2 GB each
        shutil.rmtree(folder)


@pytest.mark.slow
def test_an_export_never_replaces_an_imported_release(x4, tmp_path):
    import_released(x4, tmp_path / "ours", tiny_config(x4))
    before = {path.name for path in (tmp_path / "ours").iterdir()}
    export = export_run(tmp_path / "ours", tmp_path / "export")
    assert export_run(tmp_path / "ours", tmp_path / "export") == export, "an earlier export is replaced"
    with pytest.raises(ValueError, match="ours is not empty"):
        export_run(export, tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_damaged_shard_is_named(x4, tmp_path):
    shard = sorted(x4.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    gone = next(iter(tensors))
    save_file({key: t.clone() for key, t in tensors.items() if key != gone}, shard)
    with pytest.raises(ValueError, match=f"names tensors that are not there: {gone}"):
        import_released(x4, tmp_path / "ours", tiny_config(x4))
