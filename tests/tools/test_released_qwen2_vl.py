"""A released Qwen2-VL is imported, used, and exported to the same bits and files that transformers loads."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from eagle_train.__main__ import main
from eagle_train.data.tokenizer.added import write_tokenizer
from eagle_train.model.checkpoints.files import read_weights, same
from eagle_train.model.checkpoints.qwen2_vl import EMBEDDINGS, HEAD
from eagle_train.model.checkpoints.qwen2_vl_config import TOKENS
from eagle_train.train.config import build, load_choice
from eagle_train.train.load import load_model, read_config
from eagle_train.train.released_qwen2_vl import export_released, import_config, import_released
from eagle_train.types import Media, Message, Sample
from tests.eagle1_layout import random_weights
from tests.eagle2_layout import CASES, imported, write_release
from tests.qwen2_vl import TEXT, VISION, logits_of, row

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *TOKENS.values()]
SPECIAL += [
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
]
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 64,
    "max_pixels": 6400,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "unheard_of": 1,
}


def flat(config):
    """Returns a `config.json` as it is on the hub."""
    text = {n: v for n, v in config.pop("text_config").items() if n not in ("model_type", "rope_parameters", "dtype")}
    scaling = {"type": "mrope", "mrope_section": TEXT["rope_parameters"]["mrope_section"]}
    config["vision_config"] |= {"model_type": "qwen2_vl"}
    return text | config | {"rope_theta": 1e6, "rope_scaling": scaling, "torch_dtype": "float32", "unheard_of": [1]}


@pytest.fixture(scope="module", params=["flat-untied", "flat-tied", "nested-untied"])
def release(request, data, tmp_path_factory):
    """Returns a release of random weights, as transformers wrote it; tests must not change it."""
    folder, tied = tmp_path_factory.mktemp(request.param) / "Qwen2-VL-Tiny", request.param.endswith("-tied")
    folder.mkdir()
    write_tokenizer(str(data / "tokenizer"), SPECIAL, folder)
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=TEXT | {"vocab_size": 540},
        vision_config=VISION,
        tie_word_embeddings=tied,
        **{name: ids(token) for name, token in TOKENS.items()},
    )
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if request.param.startswith("flat"):
        (folder / "config.json").write_text(json.dumps(flat(json.loads((folder / "config.json").read_text()))))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def ours(release):
    """Returns the import of a release; tests must not change it."""
    folder = release.with_name("ours")
    import_released(release, folder, import_config(release))
    return folder


def test_import_and_export_give_back_every_bit_and_field(release, ours, tmp_path):
    assert export_released(ours, tmp_path / "back") == []
    theirs, back = read_weights(release), read_weights(tmp_path / "back")
    assert theirs.keys() == back.keys() and all(same(theirs[name], back[name]) for name in theirs)
    assert (HEAD in theirs) != read_config(ours)["llm"]["tie_word_embeddings"] and EMBEDDINGS in theirs
    for name in ("config.json", "preprocessor_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (release, tmp_path / "back"))
        before = {key: value for key, value in before.items() if key not in ("vision_config", "text_config")}
        changed = {key for key in before if after.get(key) != before[key]}
        assert changed <= {"transformers_version", "torch_dtype", "dtype", "architectures"}, name


def test_a_second_copy_of_tied_embeddings_stays_one(release, tmp_path):
    """Some training codes write it: trained on as a table of its own, the head would part from the embeddings."""
    theirs, config = tmp_path / "theirs", json.loads((release / "config.json").read_text())
    shutil.copytree(release, theirs)
    weights = read_weights(release)
    save_file(weights | {HEAD: weights[EMBEDDINGS].clone()}, theirs / "model.safetensors")
    (theirs / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    import_released(theirs, tmp_path / "ours", made := import_config(theirs))
    assert made["llm"]["tie_word_embeddings"] and "llm.lm_head.weight" not in read_weights(tmp_path / "ours")
    trained = {name: tensor.clone() for name, tensor in read_weights(tmp_path / "ours").items()}
    trained["llm.model.embed_tokens.weight"] += 1
    save_file(trained, tmp_path / "ours/model.safetensors")
    export_released(tmp_path / "ours", tmp_path / "back")
    back = read_weights(tmp_path / "back")
    assert torch.equal(back[HEAD], back[EMBEDDINGS]) and torch.equal(back[HEAD], weights[EMBEDDINGS] + 1)


def test_other_prompts_than_those_of_the_layout_are_told(ours, tmp_path):
    """Its chat template is fixed."""
    path = tmp_path / "ours"
    shutil.copytree(ours, path)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["chat_template"]["system"] = "Answer in one word."
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    assert export_released(path, tmp_path / "back") == [
        "prompts are those of chat_template=qwen2_vl there, others here"
    ]


@torch.no_grad()
def test_a_picture_gives_the_logits_of_transformers_from_the_exported_files(ours, tmp_path):
    export_released(ours, tmp_path / "back")
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "back", use_fast=False, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    model, encoder = load_model(ours)
    image = Image.linear_gradient("L").resize((70, 45)).convert("RGB")
    sample = Sample(
        key="k",
        source="s",
        messages=(Message(role="user", content=(0, "Why?")), Message(role="assistant", content=("So.",))),
        media=(Media(kind="image", width=70, height=45),),
    )
    plans, _ = encoder.plan_media(sample.media)
    tiles = encoder.new_tiles(plans)
    encoder.tiling.cut(image, plans[0], tiles)
    encoded = encoder.encode(sample, plans, tiles)
    seen = processor(images=[image], return_tensors="pt")
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    text = tokenizer.apply_chat_template([*parts, {"role": "assistant", "content": "So."}], tokenize=False)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * (seen["image_grid_thw"].prod() // 4))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    assert ids.tolist() == encoded.input_ids.tolist()
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()[None]
    wanted = theirs(input_ids=ids[None], mm_token_type_ids=kinds, use_cache=False, **seen).logits[0]
    torch.testing.assert_close(logits_of(model, row([encoded])), wanted, atol=1e-5, rtol=1e-5)


def test_words_of_the_command_line_do_it_too(release, tmp_path, capsys):
    assert main(["import", str(release), str(tmp_path / "ours")]) == 0
    assert "encoders qwen2_vit" in capsys.readouterr().out
    assert main(["chat", str(tmp_path / "ours"), "Why?", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(tmp_path / "ours"), "--layout", "qwen2_vl", "--out", str(tmp_path / "back")]) == 0
    told = read_config(tmp_path / "ours")["data"]["tiling"]
    assert (told["tile_size"], told["min_pixels"], told["max_pixels"]) == (8, 64, 6400)


@pytest.mark.parametrize("numbered", [False, True])
def test_prompts_are_those_of_the_exported_chat_template(ours, tmp_path, numbered):
    export_released(ours, tmp_path / "back")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    encoder = load_model(ours)[1]
    if numbered:
        encoder = replace(encoder, template=build(load_choice("chat_template", "qwen2_vl_ids")))
    image, video = Media(kind="image", width=16, height=16), Media(kind="video", width=16, height=16, num_frames=4)
    messages = [
        Message(role="user", content=("See", 0, "and", 1, "here?")),
        Message(role="assistant", content=("Yes.",)),
        Message(role="user", content=(2, "too?")),
        Message(role="assistant", content=("So.",)),
    ]
    media = (image, video, image)
    ids, learnt, places = encoder.lay_out(
        encoder.template.encode(messages, encoder.tokenizer), media, encoder.plan_media(media)[0]
    )
    kept = [index for n, index in enumerate(ids.tolist()) if n not in places or n - 1 not in places]
    names = {0: "image", 1: "video", 2: "image"}
    parts = [
        {
            "role": turn.role,
            "content": [
                {"type": names[p]} if isinstance(p, int) else {"type": "text", "text": p} for p in turn.content
            ],
        }
        for turn in messages
    ]
    text = tokenizer.apply_chat_template(parts, tokenize=False, add_vision_id=numbered)
    assert tokenizer.decode(kept, skip_special_tokens=False) == text
    assert ("Picture 2: <|vision_start|>" in text) == numbered == ("Video 1: " in text)
    assert tokenizer.decode(ids[learnt]) == "Yes.<|im_end|>\nSo.<|im_end|>\n"


def test_another_model_is_refused_with_the_reasons(data, tmp_path):
    config, shapes, _ = CASES["untied-with-pooling"]
    imported(write_release(tmp_path / "Eagle-Tiny", config, random_weights(shapes), data), tmp_path / "eagle")
    with pytest.raises(ValueError, match=r"siglip \(Siglip\), not qwen2_vit .* MlpProjector; the LLM is a qwen2"):
        export_released(tmp_path / "eagle", tmp_path / "back")
