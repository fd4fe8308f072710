"""A published InternVL2 checkpoint is imported, used, and exported to the same bits, in both layouts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, InternVLForConditionalGeneration

from eagle_train.__main__ import main
from eagle_train.data.collate import pack
from eagle_train.model.checkpoints import internvl
from eagle_train.model.checkpoints.files import read_weights, same, write_weights
from eagle_train.train.app import train
from eagle_train.train.config import load_config
from eagle_train.train.export_internvl import export_native, export_original
from eagle_train.train.load import CARRIED, load_model
from eagle_train.train.released_internvl import import_config, import_released
from eagle_train.types import Media, MediaPlan, Message, Sample
from tests.configs import untrained
from tests.eagle1_layout import random_weights
from tests.internvl_layout import TINY_LLM, TOKENS, original_config, original_shapes, write_original
from tests.runs import overrides

CASES = {
    "1b": {},
    "tied": {"tied": True},
    "qk-norm-without-bias": {"qk_norm": True, "qkv_bias": False},
    "internlm2": {"internlm2": True},
}


@pytest.fixture(params=[pytest.param(case, marks=() if case == "internlm2" else pytest.mark.slow) for case in CASES])
def original(request, data, tmp_path):
    changes = CASES[request.param]
    return written(data, tmp_path / "InternVL2-Tiny", **changes)


@pytest.fixture
def plain(data, tmp_path):
    return written(data, tmp_path / "InternVL2-Tiny")


def written(data, folder, **changes):
    """A tiny checkpoint of the original layout, with norms and layer scales that let pictures through."""
    weights = random_weights(original_shapes(TINY_LLM, **changes))
    weights = {
        name: 1 + tensor * 0.1 if "norm" in name or name.endswith((".ls1", ".ls2", "mlp1.0.weight")) else tensor
        for name, tensor in weights.items()
    }
    return write_original(folder, original_config(TINY_LLM, **changes), weights, data)


def imported(folder, out):
    return import_released(folder, out, import_config(folder))


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
def test_a_model_that_transformers_saved_from_memory_comes_back_to_the_bit(plain, tmp_path):
    """Its names are those of the modules, as a plain torch.save of it has them."""
    imported(plain, tmp_path / "ours")
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


def picture(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (height // 8, width // 8, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def encoded(encoder, key, *parts):
    """A sample whose media are pictures, or lists of pictures: videos. Text is text."""
    media, pictures, content = [], [], []
    for part in parts:
        if isinstance(part, str):
            content.append(part)
            continue
        content.append(len(media))
        frames = part if isinstance(part, list) else [part]
        facts = {"width": frames[0].width, "height": frames[0].height}
        if part is frames:
            members = tuple(f"{i}.png" for i in range(len(frames)))
            media.append(Media(kind="video", members=members, num_frames=len(frames), duration=len(frames), **facts))
        else:
            media.append(Media(kind="image", member="0.png", **facts))
        pictures.append(frames)
    messages = (Message(role="user", content=tuple(content)), Message(role="assistant", content=("So it is.",)))
    plans, _ = encoder.plan_media(media)
    tiles = encoder.new_tiles(plans)
    place = 0
    for frames, plan in zip(pictures, plans, strict=True):
        for frame in frames:
            one = plan if plan.num_frames == 1 else MediaPlan()
            encoder.tiling.cut(frame, one, tiles[place : place + one.num_tiles])
            place += one.num_tiles
    assert place == len(tiles)
    return encoder.encode(Sample(key=key, source="s", messages=messages, media=tuple(media)), plans, tiles)


def samples(encoder):
    """Images, several images, a video, all together, text only."""
    wide, small, tall = picture(120, 64, 1), picture(40, 40, 2), picture(32, 96, 3)
    frames = [picture(48, 32, seed) for seed in range(4, 8)]
    return [
        encoded(encoder, "image", wide, "\nWhat is it?"),
        encoded(encoder, "images", wide, "\n", tall, "\n", small, "\nWhich is red?"),
        encoded(encoder, "video", frames, "\nWhat moves?"),
        encoded(encoder, "mixed", small, "\n", frames, "\nIs it there?"),
        encoded(encoder, "text", "Why?"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_own_class_gives_our_logits_and_losses(data, tmp_path, case):
    imported(written(data, tmp_path / "original", **CASES[case]), tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "native")
    model, encoder = load_model(tmp_path / "ours")
    native = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native", dtype=torch.float32)
    native.eval().set_attn_implementation("eager")
    vit = model.mixture.encoders["intern_vit"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vit.mean, vit.std))
    found = samples(encoder)
    assert [len(sample.pixels) for sample in found] == [9, 8, 4, 5, 0]
    row = pack(found, [], filler_id=encoder.image_id, tile_size=encoder.tile_size)
    losses = model(row).split(row.cu_seqlens.diff().tolist())
    for sample, own in zip(found, losses, strict=True):
        pixels = {"pixel_values": (sample.pixels.float() / 255 - mean) / std} if len(sample.pixels) else {}
        wanted = native(input_ids=sample.input_ids[None], use_cache=False, **pixels).logits[0]
        embeddings = model.llm.get_input_embeddings()(sample.input_ids)
        if pixels:
            embeddings = model.embed(sample.input_ids, sample.image_positions, sample.pixels)
        logits = model.llm(inputs_embeds=embeddings[None], use_cache=False).logits[0]
        assert wanted.std() > 0.1
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
        expected = F.cross_entropy(wanted, sample.labels, reduction="none")
        torch.testing.assert_close(own, expected, rtol=0, atol=2e-5)
        if pixels:  # what is seen matters
            blind = native(input_ids=sample.input_ids[None], use_cache=False, pixel_values=pixels["pixel_values"] * 0)
            assert (blind.logits[0] - wanted).abs().max() > 1e-2


def test_an_untied_head_stays_untied_in_transformers(plain, tmp_path):
    imported(plain, tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "native")
    config = json.loads((tmp_path / "native/config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["text_config"]["tie_word_embeddings"] is False
    native = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native")
    head = read_weights(plain)["language_model.lm_head.weight"]
    assert torch.equal(native.lm_head.weight.float(), head.float())
    assert not torch.equal(native.lm_head.weight, native.get_input_embeddings().weight)


def test_the_processor_of_the_exported_folder_gives_our_ids_and_tiles(plain, tmp_path):
    imported(plain, tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "native")
    model, encoder = load_model(tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    exact = AutoImageProcessor.from_pretrained(tmp_path / "native", backend="pil")
    wide, small = picture(120, 64, 1), picture(40, 40, 2)
    frames = torch.stack([torch.from_numpy(pixels_of(picture(32, 32, seed))) for seed in range(3)])
    asked = [
        ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, (wide,)),
        ({"role": "user", "content": [{"type": "text", "text": "Why?"}]}, ()),
    ]
    ours = [encoded(encoder, "image", wide, "What is it?"), encoded(encoder, "text", "Why?")]
    for (message, images), sample in zip(asked, ours, strict=True):
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=list(images) or None, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        assert sample.input_ids[: len(ids)].tolist() == ids
        if images:
            encoder_of = model.mixture.encoders["intern_vit"]
            normal = encoder_of.normalize(sample.pixels, 32)
            torch.testing.assert_close(inputs["pixel_values"], normal, rtol=0, atol=2 / 255 / 0.22)
            pixels = exact(images=list(images), crop_to_patches=True, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(pixels, normal, rtol=0, atol=1e-5)
    message = {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "Why?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=[small], videos=[frames], return_tensors="pt")
    sample = encoded(encoder, "both", [picture(32, 32, seed) for seed in range(3)], "\n", small, "\nWhy?")
    ids = inputs["input_ids"][0].tolist()
    assert sample.input_ids[: len(ids)].tolist() == ids and len(inputs["pixel_values"]) == 4


def pixels_of(image):
    return np.array(image).transpose(2, 0, 1)


def test_the_chat_template_of_the_original_layout_loads_with_its_tokenizer(plain, tmp_path):
    imported(plain, tmp_path / "ours")
    export_original(tmp_path / "ours", tmp_path / "back")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    parts = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert (
        text.startswith("<|im_start|>system\n你是由上海人工智能实验室")
        and "<|im_end|><|im_start|>user\n<image>\nWhy?" in text
    )
    generation = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert set(generation["eos_token_id"]) >= set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))


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


def test_names_of_both_layouts_are_told_apart():
    assert internvl.is_native(["model.vision_tower.x"]) and internvl.is_native(["multi_modal_projector.x"])
    assert not internvl.is_native(["vision_model.embeddings.class_embedding", "language_model.model.norm.weight"])
