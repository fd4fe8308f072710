"""An exported InternVL2 in transformers' own classes: the same logits, ids and tiles as here."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, InternVLForConditionalGeneration

from eagle_train.data.collate import pack
from eagle_train.model.checkpoints.files import read_weights
from eagle_train.train.export_internvl import export_native, export_original
from eagle_train.train.load import load_model
from eagle_train.train.released_internvl import import_config
from eagle_train.types import Media, MediaPlan, Message, Sample
from tests.internvl_layout import CASES, PHI3_ORIGINAL, imported, written


@pytest.fixture
def plain(data, tmp_path):
    return written(data, tmp_path / "InternVL2-Tiny")


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
    assert case != "phi3" or min(row.segment_lengths) < PHI3_ORIGINAL < max(row.segment_lengths)
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


def test_an_import_takes_the_statistics_of_the_processor_where_there_is_one(plain, tmp_path):
    """The original code has ImageNet's in its source, whatever files lie beside a checkpoint."""
    imported(plain, tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "native")
    stats = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    content = json.loads((tmp_path / "native/preprocessor_config.json").read_text()) | stats
    for folder in (tmp_path / "native", plain):
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
    native, original = (import_config(f)["mixture"]["encoders"]["intern_vit"] for f in (tmp_path / "native", plain))
    assert (native["mean"], native["std"]) == (stats["image_mean"], stats["image_std"])
    assert original.get("mean") != native["mean"] and original.get("std") != native["std"]
