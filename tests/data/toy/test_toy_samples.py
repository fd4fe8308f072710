"""Toy samples: reproducible, disjoint between the splits, balanced, and canonical."""

import hashlib
import io
import json
from collections import Counter

import av
import pytest
from PIL import Image

from eagle_train.data.toy.draw import MAX_SIDE, MIN_SIDE
from eagle_train.data.toy.samples import KINDS, question_types, toy_sample, toy_samples
from eagle_train.data.toy.splits import image_in_split, split_of

NUM_TYPES = 12
SETS = [(kind, "train") for kind in KINDS] + [("all", "heldout")]


def answers(record):
    return [m["content"][0]["text"] for m in record["messages"] if m["role"] == "assistant"]


def parts_of(record):
    return [part for message in record["messages"] for part in message["content"]]


@pytest.fixture(scope="module")
def samples():
    """Some samples of every train kind and five rounds through the held-out types, made once."""
    return {(kind, split): list(toy_samples(kind, split, 60, 0)) for kind, split in SETS}


@pytest.mark.parametrize(("kind", "split"), SETS)
def test_a_sample_made_alone_equals_the_one_of_the_whole_set(kind, split, samples):
    for index in (0, 7, 11):
        assert toy_sample(kind, split, index, 0) == samples[kind, split][index]


@pytest.mark.parametrize(("kind", "split"), SETS)
def test_another_seed_gives_other_samples(kind, split, samples):
    others = list(toy_samples(kind, split, 20, 1))
    assert all(other[1:] != sample[1:] for other, sample in zip(others, samples[kind, split], strict=False))


def test_no_picture_is_in_both_splits(samples):
    hashes = {"train": set(), "heldout": set()}
    for (_, split), made in samples.items():
        hashes[split] |= {hashlib.sha256(data).digest() for _, _, media in made for data in media.values()}
    assert len(hashes["train"]) > 400 and len(hashes["heldout"]) > 60
    assert not hashes["train"] & hashes["heldout"]


def test_pixels_alone_decide_the_split(samples):
    num_images = 0
    for (_, split), made in samples.items():
        for data in (data for _, _, media in made for name, data in media.items() if name.endswith(".png")):
            assert split_of(Image.open(io.BytesIO(data)).tobytes()) == split
            num_images += 1
    assert num_images > 400


def test_a_drawing_of_the_other_split_is_drawn_again():
    shades = iter(range(256))
    image_in_split("heldout", lambda: Image.new("RGB", (2, 2), (next(shades), 0, 0)))
    drawn = next(shades)
    other = [Image.new("RGB", (2, 2), (shade, 0, 0)).tobytes() for shade in range(drawn)]
    assert [split_of(pixels) for pixels in other] == ["train"] * (drawn - 1) + ["heldout"]


@pytest.mark.parametrize(("kind", "split"), SETS)
def test_records_are_canonical(kind, split, samples):
    made = samples[kind, split]
    assert len({key for key, _, _ in made}) == len(made)
    for key, record, media in made:
        assert "." not in key and "/" not in key
        assert json.loads(json.dumps(record)) == record
        assert [item["member"] for item in record["media"]] == list(media)
        suffixes = ["png" if item["kind"] == "image" else "mp4" for item in record["media"]]
        assert [f"{index}.{suffix}" for index, suffix in enumerate(suffixes)] == list(media)
        used = [part["index"] for part in parts_of(record) if part["type"] == "media"]
        assert used == list(range(len(media)))
        roles = [message["role"] for message in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles


@pytest.mark.parametrize(("kind", "split"), [pair for pair in SETS if pair[0] not in ("captions", "timelines")])
def test_answers_are_short_and_plain(kind, split, samples):
    for answer in (answer for _, record, _ in samples[kind, split] for answer in answers(record)):
        assert answer == answer.lower().strip() and 1 <= len(answer.split()) <= 2 and not answer.endswith(".")


def test_pictures_keep_their_size_limits(samples):
    sizes = {Image.open(io.BytesIO(d)).size for _, _, media in samples["shapes", "train"] for d in media.values()}
    assert len(sizes) > 30
    for size in sizes:
        assert min(size) >= MIN_SIDE and max(size) <= MAX_SIDE and max(size) <= 2 * min(size)


def test_clips_have_8_to_16_frames_of_even_size(samples):
    for _, _, media in samples["video", "train"][:10]:
        with av.open(io.BytesIO(media["0.mp4"])) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        assert 8 <= len(frames) <= 16
        assert all(64 <= side <= 96 and side % 2 == 0 for side in frames[0].size)


def test_train_conversations_ask_several_different_questions(samples):
    for kind in ("shapes", "bars", "digits", "words", "documents"):
        for _, record, media in samples[kind, "train"]:
            questions = [message["content"][-1]["text"] for message in record["messages"][::2]]
            assert 3 <= len(set(questions)) == len(questions) <= 5 and len(media) == 1
            assert record["messages"][0]["content"][0] == {"type": "media", "index": 0}
            assert record["meta"] == {"kind": kind}


def test_some_conversations_bring_a_second_picture_in_their_second_turn(samples):
    second = {"type": "media", "index": 1}
    records = [record for _, record, _ in samples["multi_image", "train"]]
    later = [record for record in records if any(second in m["content"] for m in record["messages"][2:])]
    assert 5 < len(later) < 40


def test_heldout_types_are_balanced_and_ask_one_question(samples):
    types = Counter(record["meta"]["type"] for _, record, _ in samples["all", "heldout"])
    assert types == dict.fromkeys(question_types("all"), 60 // NUM_TYPES) and len(types) == NUM_TYPES
    assert all(len(record["messages"]) == 2 for _, record, _ in samples["all", "heldout"])


@pytest.mark.parametrize(
    ("kind", "num_answers"), [("shapes", 24), ("bars", 9), ("digits", 10), ("words", 20), ("multi_image", 3)]
)
def test_heldout_answers_are_uniform_within_their_type(kind, num_answers):
    counts = Counter()
    for _, record, _ in toy_samples(kind, "heldout", 60 * len(question_types(kind)), 0):
        counts[record["meta"]["type"], answers(record)[0]] += 1
    assert len(counts) == num_answers
    for question_type in question_types(kind):
        of_type = [count for (name, _), count in counts.items() if name == question_type]
        assert max(of_type) - min(of_type) == 0 and sum(of_type) == 60


def test_unknown_kinds_and_splits_are_named_in_the_error():
    with pytest.raises(ValueError, match="no train split of kind 'cats'"):
        toy_sample("cats", "train", 0, 0)
    with pytest.raises(ValueError, match="no held-out questions for kind 'captions'"):
        toy_sample("captions", "heldout", 0, 0)
    with pytest.raises(ValueError, match="no split 'test'"):
        toy_sample("shapes", "test", 0, 0)
