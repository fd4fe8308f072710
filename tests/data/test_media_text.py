"""Prompts are the published ones, character by character and id by id; training and inference share them."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_train.data.encode import Encoder
from eagle_train.data.media_text import MediaText
from eagle_train.data.tokenizer.load import load_tokenizer
from eagle_train.train.evaluate import make_prompt
from eagle_train.types import Media, MediaPlan, Message
from tests.data.test_degrade import SPECIAL, conversations, encoder_of, tokenizer_of

IMAGE = Media(kind="image", width=8, height=8)
VIDEO = Media(kind="video", duration=5.0, num_frames=50)
UNTIMED = Media(kind="video", num_frames=9)
PAPER = Media(kind="document", num_frames=9)
ONE, TWO_TILES, THREE = MediaPlan(), MediaPlan(cols=2, thumbnail=True), MediaPlan(num_frames=3)
TOKENS = 2
"""Of a tile."""
V = "<img>" + "<IMG_CONTEXT>" * TOKENS + "</img>"
GRID = "<img>" + "<IMG_CONTEXT>" * 3 * TOKENS + "</img>"
HELPFUL, NAMED = "You are a helpful assistant.", "You are an AI assistant whose name is Eagle-Next."


def chat(system: str, *turns: str) -> str:
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for place, turn in enumerate(turns):
        text += f"<|im_start|>{('user', 'assistant')[place % 2]}\n{turn}<|im_end|>\n"
    return text


# Media and plans, turns as records have them, and what the published code makes of them.
CASES = {
    "one image": (
        [(IMAGE, TWO_TILES)],
        [(0, "\nWhat is it?"), ("A cat.",)],
        {
            "eagle2": chat(HELPFUL, f"{GRID}\nWhat is it?", "A cat."),
            "eagle2_5": chat(HELPFUL, f"<image 1>{GRID}What is it?", "A cat."),
            "eagle2_5_training": chat(NAMED, f"{GRID}\nWhat is it?", "A cat."),
        },
    ),
    "images in two turns": (
        [(IMAGE, ONE), (IMAGE, ONE), (IMAGE, TWO_TILES)],
        [(0, 1, "Which one?"), ("The first.",), ("And this?\n", 2), ("No.",)],
        {
            "eagle2": chat(
                HELPFUL,
                f"<image 1>{V}\n<image 2>{V}\nWhich one?",
                "The first.",
                f"And this?\n<image 3>{GRID}\n",
                "No.",
            ),
            "eagle2_5": chat(
                HELPFUL, f"<image 1>{V}<image 2>{V}Which one?", "The first.", f"And this?\n<image 3>{GRID}", "No."
            ),
            "eagle2_5_training": chat(
                NAMED, f"<image 1>{V}\n<image 2>{V}\nWhich one?", "The first.", f"And this?\n<image 3>{GRID}", "No."
            ),
        },
    ),
    "a video": (
        [(VIDEO, THREE)],
        [(0, "\n How many? "), (" Two. ",)],
        {
            "eagle2": chat(
                HELPFUL,
                f"This is a video:\nFrame 1 sampled at 0.00 seconds: {V}\nFrame 2 sampled at 2.40 seconds: {V}\n"
                f"Frame 3 sampled at 4.90 seconds: {V}\n How many? ",
                " Two. ",
            ),
            "eagle2_5": chat(
                HELPFUL,
                f"The first video sampled with 0.60 fps: Frame 1 sample at 0.00s: {V}Frame 2 sample at 2.40s: {V}"
                f"Frame 3 sample at 4.90s: {V} How many? ",
                " Two. ",
            ),
            "eagle2_5_training": chat(
                NAMED,
                f"The first video of 5.00 seconds at 0.60 fps: Frame 1: {V}Frame 2: {V}Frame 3: {V}\n How many?",
                "Two.",
            ),
        },
    ),
    "a video without times, and an image": (
        [(UNTIMED, MediaPlan(num_frames=2)), (IMAGE, ONE)],
        [(0, 1, "Alike?"), ("Yes.",)],
        {
            "eagle2": chat(HELPFUL, f"This is a video:\nFrame 1: {V}\nFrame 2: {V}\n{V}\nAlike?", "Yes."),
            "eagle2_5": chat(HELPFUL, f"The first video: Frame 1: {V}Frame 2: {V}<image 1>{V}Alike?", "Yes."),
            "eagle2_5_training": chat(NAMED, f"The first video: Frame 1: {V}Frame 2: {V}\n{V}\nAlike?", "Yes."),
        },
    ),
    "a document": (  # ours
        [(PAPER, THREE)],
        [(0, "\nWho wrote it?"), ("Ada.",)],
        {
            "eagle2": chat(
                HELPFUL,
                f"This is a document of 9 pages:\nPage 1: {V}\nPage 5: {V}\nPage 9: {V}\nWho wrote it?",
                "Ada.",
            ),
            "eagle2_5": chat(
                HELPFUL, f"The first document of 9 pages: Page 1: {V}Page 5: {V}Page 9: {V}Who wrote it?", "Ada."
            ),
            "eagle2_5_training": chat(
                NAMED, f"The first document of 9 pages: Page 1: {V}Page 5: {V}Page 9: {V}\nWho wrote it?", "Ada."
            ),
        },
    ),
    "text": (
        [],
        [("Hello",), ("Hi",)],
        {
            "eagle2": chat(HELPFUL, "Hello", "Hi"),
            "eagle2_5": chat(HELPFUL, "Hello", "Hi"),
            "eagle2_5_training": chat(NAMED, "Hello", "Hi"),
        },
    ),
}


@pytest.fixture(scope="module", params=["trained here", "qwen2.5"])
def tokenizer(request, tmp_path_factory):
    if request.param == "trained here":
        return tokenizer_of("apart")
    data = os.environ.get("EAGLE_TRAIN_TEST_DATA")
    if data is None:
        pytest.skip("EAGLE_TRAIN_TEST_DATA names no folder of vocabularies")
    found = load_tokenizer(str(Path(data) / "tokenizers" / "qwen2.5"), tmp_path_factory.mktemp("cache"))
    found.add_special_tokens({"additional_special_tokens": SPECIAL[3:]}, replace_extra_special_tokens=False)
    return found


def make_encoder(name: str, tokenizer) -> Encoder:
    return replace(encoder_of(name, "apart", 0, TOKENS), tokenizer=tokenizer)


def laid_out(encoder: Encoder, pairs, turns):
    """Returns ids, targets and positions of a conversation."""
    messages = [Message(role=("user", "assistant")[place % 2], content=turn) for place, turn in enumerate(turns)]
    media, plans = zip(*pairs, strict=True) if pairs else ((), ())
    return encoder.lay_out(encoder.template.encode(messages, encoder.tokenizer), media, plans)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eagle2", "eagle2_5", "eagle2_5_training"])
def test_a_conversation_reads_as_published(tokenizer, name, case):
    pairs, turns, published = CASES[case]
    encoder = make_encoder(name, tokenizer)
    ids, targets, positions = laid_out(encoder, pairs, turns)
    assert tokenizer.decode(ids, skip_special_tokens=False) == published[name]
    assert ids.tolist() == tokenizer.encode(published[name], add_special_tokens=False), "as one string"
    assert {tokenizer.convert_ids_to_tokens(int(ids[place])) for place in positions} <= {"<IMG_CONTEXT>"}
    assert len(positions) == (ids == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")).sum()
    # Learnt is what follows "assistant\n", up to the end token and with it.
    answers = [part.split("<|im_end|>")[0] + "<|im_end|>" for part in published[name].split("assistant\n")[1:]]
    assert tokenizer.decode(ids[targets], skip_special_tokens=False) == "".join(answers)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(conversations(), st.sampled_from(["eagle2", "eagle2_5", "eagle2_5_training", "chatml"]))
def test_a_prompt_is_how_training_begins(sample, name):
    """What the model is asked is, id by id, what it was trained to go on from."""
    encoder = make_encoder(name, tokenizer_of("apart"))
    plans, _ = encoder.plan_media(sample.media, 2000)
    pixels = encoder.new_tiles(plans)
    encoded = encoder.encode(sample, plans, pixels)
    prompt = make_prompt(encoder, sample.messages[:-1], sample.media, plans, pixels)
    assert encoded.input_ids.tolist()[: len(prompt.input_ids)] == prompt.input_ids
    assert encoded.image_positions.tolist() == prompt.image_positions
    first_learnt = (encoded.labels[len(prompt.input_ids) - 1 :] >= 0).tolist()
    assert first_learnt[0], "the next token is the answer's first"


def test_a_string_that_names_what_it_cannot_is_refused():
    with pytest.raises(ValueError, match=r"frame .*fps.* may name number, seconds"):
        MediaText(frame="Frame {number} at {fps}")


def test_beyond_the_tenth_videos_are_counted_in_digits():
    media = [replace(VIDEO, num_frames=1)] * 11
    pairs = [(medium, ONE) for medium in media]
    encoder = make_encoder("eagle2_5", tokenizer_of("apart"))
    ids, _, _ = laid_out(encoder, pairs, [(*range(11), "Hm?"), ("Oh.",)])
    text = encoder.tokenizer.decode(ids)
    assert "The tenth video sampled" in text and "The 11 video sampled" in text
