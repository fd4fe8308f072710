"""A released Eagle 2 or 2.5 checkpoint is imported, used, and exported to the same bits and files that others load."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from eagle_train.__main__ import main
from eagle_train.model.checkpoints.files import read_weights, same, write_weights
from eagle_train.train.app import train
from eagle_train.train.config import load_config
from eagle_train.train.export_eagle2 import export_released
from eagle_train.train.load import CARRIED, export_run, load_model, read_config
from eagle_train.train.released_eagle2 import HEAD
from tests.configs import untrained
from tests.eagle1_layout import random_weights
from tests.eagle2_layout import (
    ALONE,
    CASES,
    CODE,
    EMBEDDINGS,
    TINY_LLM,
    TOKENS,
    imported,
    text_config,
    write_release,
)
from tests.runs import overrides

POOLING_KEYS = 11


@pytest.fixture(params=CASES)
def release(request, data, tmp_path):
    config, shapes, change = CASES[request.param]
    weights = random_weights(shapes)
    return write_release(tmp_path / "Eagle-Tiny", config, change(weights) if change else weights, data)


@pytest.fixture
def plain(data, tmp_path):
    """An untied release with a pooling head."""
    config, shapes, _ = CASES["untied-with-pooling"]
    return write_release(tmp_path / "Eagle-Tiny", config, random_weights(shapes), data)


def test_import_and_export_give_back_every_bit(release, tmp_path):
    done = imported(release, tmp_path / "ours")
    export_released(tmp_path / "ours", tmp_path / "back")
    theirs, back = read_weights(release), read_weights(tmp_path / "back")
    assert theirs.keys() == back.keys() and all(same(back[key], tensor) for key, tensor in theirs.items())
    pooling = sum(".head." in key and "vision_model.head" in key for key in theirs)
    norms = sum("vision_tower.head.norm" in key for key in theirs)
    twice = HEAD in theirs and HEAD in done.match.unused
    assert len(done.match.unused) == pooling + norms + twice and pooling in (0, POOLING_KEYS)
    assert done.strays == []
    original, written = (json.loads((f / "config.json").read_text()) for f in (release, tmp_path / "back"))
    llm = "text_config" if "text_config" in original else "llm_config"
    assert written[llm]["vocab_size"] == 525, "of the tensors; the release claims 151936"
    written[llm]["vocab_size"] = original[llm]["vocab_size"]
    written["image_token_index"] = original.get("image_token_index")
    for name, value in original.items():
        told = {k: written[name][k] for k in value} if isinstance(value, dict) else written[name]
        if name == "vision_config" and "siglip_vision_config" in value:
            inner = value.pop("siglip_vision_config")
            found = told.pop("siglip_vision_config")
            assert {k: found[k] for k in inner} == inner
        assert told == value, name
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (release / "tokenizer.json").read_bytes()
    assert (tmp_path / "back/configuration_eagle2_5_vl.py").read_text() == CODE


@pytest.mark.slow
def test_the_imported_model_has_the_released_values(release, tmp_path):
    imported(release, tmp_path / "ours")
    model, encoder = load_model(tmp_path / "ours")
    weights = read_weights(release)
    tower = next(key for key in weights if key.endswith("post_layernorm.weight")).removesuffix("post_layernorm.weight")
    siglip = model.mixture.encoders["siglip"]
    layer = "encoder.layers.1.self_attn.q_proj.weight"
    assert torch.equal(siglip.get_parameter(f"vit.{layer}"), weights[tower + layer].float())
    for index in (0, 1, 3):
        assert torch.equal(model.projector.layers[index].weight, weights[f"mlp1.{index}.weight"].float())
    head = weights.get(HEAD, weights[EMBEDDINGS])
    assert torch.equal(model.llm.lm_head.weight, head.float())
    assert encoder.template.image_token == "<IMG_CONTEXT>" and encoder.tile_size == 32
    if "convnext" in model.mixture.encoders:
        gamma = next(t for key, t in weights.items() if ".stages.2.blocks.0." in key and t.dim() == 1)
        found = dict(model.mixture.encoders["convnext"].named_parameters())["stages.2.blocks.0.gamma"]
        assert torch.equal(found, gamma.float())


@pytest.mark.slow
def test_our_features_are_those_of_the_libraries_on_the_exported_files(plain, tmp_path):
    imported(plain, tmp_path / "ours")
    export_released(tmp_path / "ours", tmp_path / "back")
    config, weights = json.loads((tmp_path / "back/config.json").read_text()), read_weights(tmp_path / "back")
    model, _ = load_model(tmp_path / "ours")
    siglip = SiglipVisionModel(SiglipVisionConfig.from_dict(config["vision_config"])).eval()
    tower = {key.removeprefix(ALONE): t.float() for key, t in weights.items() if key.startswith(ALONE)}
    siglip.load_state_dict(tower)
    llm = Qwen2ForCausalLM(Qwen2Config.from_dict(config["text_config"])).eval()
    llm.load_state_dict(
        {k.removeprefix("language_model."): t.float() for k, t in weights.items() if k.startswith("language_model.")}
    )
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        features = siglip(pixels.float() / 127.5 - 1).last_hidden_state  # (2, 16, C), 4 x 4 row by row
        squares = torch.stack([features[:, i : i + 1] for i in (0, 1, 4, 5)]).permute(1, 2, 0, 3).flatten(2)
        torch.testing.assert_close(model.mixture(pixels)[:, :1], squares, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.llm(input_ids=ids).logits, llm(input_ids=ids).logits)


# What vLLM reads, from vllm/model_executor/models/eagle2_5_vl.py: attributes of the config without a default, and the
# names under which AutoWeightsLoader looks for the weights of each part. vLLM itself is not run here.
VLLM_FIELDS = (
    "force_image_size",
    "min_dynamic_patch",
    "max_dynamic_patch",
    "dynamic_image_size",
    "use_thumbnail",
    "downsample_ratio",
)
VLLM_VISION_FIELDS = ("image_size", "patch_size", "num_hidden_layers", "hidden_size", "intermediate_size")
VLLM_PARTS = ("vision_model.vision_model.", "mlp1.0.", "mlp1.1.", "mlp1.3.", "language_model.")


@pytest.mark.slow
def test_the_exported_folder_has_what_vllm_and_transformers_read(plain, tmp_path):
    imported(plain, tmp_path / "ours")
    (tmp_path / "ours" / CARRIED / "config.json").unlink()  # as of a model that was trained here from the start
    export_released(tmp_path / "ours", tmp_path / "back")
    back = tmp_path / "back"
    files = {"config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"}
    files |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert files <= {path.name for path in back.iterdir()}
    config = json.loads((back / "config.json").read_text())
    assert config["architectures"] == ["Eagle2_5_VLForConditionalGeneration"] and config["model_type"] == "eagle_2_5_vl"
    assert {name: config[name] for name in VLLM_FIELDS} == {
        "force_image_size": 32,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "downsample_ratio": 0.5,
    }
    assert config["vision_config"].keys() >= set(VLLM_VISION_FIELDS)
    assert (config["max_dynamic_tiles"], config["select_layer"], config["mlp_connector_layers"]) == (12, -1, 2)
    assert config["auto_map"]["AutoConfig"] == "nvidia/Eagle2.5-8B--configuration_eagle2_5_vl.Eagle2_5_VLConfig"
    tokenizer = AutoTokenizer.from_pretrained(back)
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert tokenizer.decode([config["image_token_index"]]) == "<IMG_CONTEXT>"
    parts = read_weights(back).keys()
    assert all(key.startswith(VLLM_PARTS) for key in parts)
    assert all(any(key.startswith(prefix) for key in parts) for prefix in VLLM_PARTS)
    stop = GenerationConfig.from_pretrained(back).eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stop
    preprocessor = json.loads((back / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"height": 32, "width": 32} and preprocessor["image_mean"] == [0.5] * 3
    assert preprocessor["tokens_per_tile"] == 4 and preprocessor["max_dynamic_tiles"] == 12
    assert json.loads((back / "processor_config.json").read_text())["image_token"] == "<IMG_CONTEXT>"


def test_a_pooling_head_is_written_where_it_is_asked_for(data, tmp_path):
    config, shapes, _ = CASES["tied-without-pooling"]
    release = write_release(tmp_path / "r", config, random_weights(shapes), data)
    imported(release, tmp_path / "ours")
    export_released(tmp_path / "ours", tmp_path / "back", pooling_head=True)
    added = read_weights(tmp_path / "back").keys() - read_weights(release).keys()
    assert len(added) == POOLING_KEYS and all(key.startswith(f"{ALONE}head.") for key in added)
    assert json.loads((tmp_path / "back/config.json").read_text())["vision_config"]["vision_use_head"] is True


def test_a_head_that_is_stored_twice_follows_the_embeddings(data, tmp_path):
    config, shapes, change = CASES["tied-and-stored-twice"]
    release = write_release(tmp_path / "r", config, change(random_weights(shapes)), data)
    imported(release, tmp_path / "ours")
    weights = read_weights(tmp_path / "ours")
    weights = {name: t + 1 if name == "llm.model.embed_tokens.weight" else t.clone() for name, t in weights.items()}
    (tmp_path / "ours/model.safetensors").unlink()
    write_weights(tmp_path / "ours", weights)
    export_released(tmp_path / "ours", tmp_path / "back")
    back = read_weights(tmp_path / "back")
    assert same(back[HEAD], back[EMBEDDINGS]) and not same(back[HEAD], read_weights(release)[HEAD])


def test_an_import_with_a_tied_head_is_exported_again_as_ours(data, tmp_path):
    config, shapes, _ = CASES["tied-without-pooling"]
    imported(write_release(tmp_path / "r", config, random_weights(shapes), data), tmp_path / "ours")
    export_run(tmp_path / "ours", tmp_path / "again")
    ours, again = read_weights(tmp_path / "ours"), read_weights(tmp_path / "again")
    assert ours.keys() == again.keys() and all(same(again[name], t) for name, t in ours.items())


def test_the_commands_choose_the_family_and_say_what_is_kept_apart(plain, tmp_path, capsys):
    assert main(["import", str(plain), str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "encoders siglip" in said and f"not used by the model: {POOLING_KEYS} tensors (head)" in said
    assert read_config(tmp_path / "ours")["llm"]["vocab_size"] == 525
    Image.new("RGB", (100, 40), "red").save(tmp_path / "red.png")
    asked = ["chat", str(tmp_path / "ours"), "What is it?", "--image", str(tmp_path / "red.png")]
    assert main([*asked, "--max-new-tokens", "3"]) == 0, "the image is cut into tiles"
    capsys.readouterr()
    assert main(["export", str(tmp_path / "ours"), "--layout", "eagle2", "--out", str(tmp_path / "back")]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "back") and said.err == ""


def test_a_model_of_another_shape_is_refused_with_every_reason(data, tmp_path):
    with pytest.raises(ValueError, match=r"encoders are vit \(ClipVit\).*parameters of its own.*begin with a norm"):
        export_released(untrained(data, tmp_path / "toy"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tokenizer_without_the_special_tokens_is_refused(plain, data, tmp_path):
    imported(plain, tmp_path / "ours")
    for path in (data / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "ours" / path.name)
    said = r"does not have <\|im_start\|>, <\|im_end\|>, <img>, </img>, .* list them in new_tokens"
    with pytest.raises(ValueError, match=said):
        export_released(tmp_path / "ours", tmp_path / "back")


def test_prompts_of_another_layout_are_refused(plain, tmp_path):
    imported(plain, tmp_path / "ours")
    config = yaml.safe_load((tmp_path / "ours/config.yaml").read_text())
    config["chat_template"]["media"]["prefix"] = "<start>"
    (tmp_path / "ours/config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"has the prefix, image_token and suffix \('<start>'"):
        export_released(tmp_path / "ours", tmp_path / "back")


def test_what_does_not_fit_leaves_nothing_behind(data, tmp_path, capsys):
    config, shapes, _ = CASES["untied-with-pooling"]
    weights = random_weights(shapes)
    del weights["mlp1.3.bias"]
    weights["mlp2.weight"] = torch.zeros(3)
    release = write_release(tmp_path / "r", config, weights, data)
    assert main(["import", str(release), str(tmp_path / "ours")]) == 1
    said = capsys.readouterr().err
    assert "1 missing: mlp1.3.bias" in said and "1 without a place in the model: mlp2.weight" in said
    assert not (tmp_path / "ours").exists()


@pytest.mark.slow
def test_the_text_config_of_an_export_is_that_of_the_release(plain, tmp_path):
    imported(plain, tmp_path / "ours")
    (tmp_path / "ours" / CARRIED / "config.json").unlink()
    export_released(tmp_path / "ours", tmp_path / "back")
    written = json.loads((tmp_path / "back/config.json").read_text())["text_config"]
    expected = text_config(TINY_LLM, tied=False, vocab_size=525)
    assert {name: written[name] for name in expected} == expected


@pytest.mark.slow
def test_a_model_that_was_trained_here_leaves_in_the_released_layout_and_comes_back(data, tmp_path, capsys):
    run = tmp_path / "run"
    kept = [o for o in overrides(data, run) if not o.startswith("mixture.")]
    tokens = ",".join(f"'{token}'" for token in TOKENS)
    own = [f"new_tokens=[{tokens}]", "llm.vocab_size=525", "chat_template=eagle2"]
    short = ["schedule.pretrain.num_steps=1", "schedule.sft.num_steps=1"]
    assert train(load_config([*kept, "mixture=toy_eagle2", "projector=eagle2", *own, *short]))
    assert main(["export", str(run), "--layout", "eagle2"]) == 0
    said = capsys.readouterr()
    assert "cut by ImageAreaPreservation there, by PadToSquare here" in said.err
    out = run / "export-eagle2"
    config = json.loads((out / "config.json").read_text())
    assert (
        config["image_token_index"] == 514 == AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<IMG_CONTEXT>")
    )
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"] and not config["dynamic_image_size"]
    imported(out, tmp_path / "ours")
    theirs, ours = read_weights(run / "export-eagle2"), read_weights(tmp_path / "ours")
    assert len(theirs) == len(ours)
    trained, _ = load_model(run)
    assert all(torch.equal(ours[name], tensor) for name, tensor in trained.state_dict().items())
