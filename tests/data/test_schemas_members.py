"""Samples of WebDataset tars: their json, captions and media become one record."""

import json

import pytest

from eagle_train.data.placeholders import MediaRef
from eagle_train.data.schemas import parse_members
from eagle_train.types import SampleError


def llava(*texts, **fields):
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)], **fields}


def chat(*contents, **fields):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)], **fields}


def turns(record):
    return [(message.role, *message.content) for message in record.messages]


def members(record=None, **contents):
    encoded = {} if record is None else {"json": json.dumps(record).encode()}
    return {name.replace("__", "."): data for name, data in contents.items()} | encoded


def test_tar_caption_pairs_keep_the_json_as_meta():
    sample = members({"caption": "A dog.", "url": "u"}, jpg=b"", txt=b"A dog.\n")
    record = parse_members(sample, key="d/000")
    assert turns(record) == [("user", 0), ("assistant", "A dog.")]
    assert record.media == (MediaRef("image", "jpg"),) and record.meta == {"url": "u"}


def test_tar_captions_come_from_txt_or_json():
    expected = [("user", 0), ("assistant", "A dog.")]
    assert turns(parse_members(members(webp=b"", txt=b"A dog."), key="0")) == expected
    assert turns(parse_members(members({"caption": "A dog.", "image": "gone.jpg"}, png=b""), key="0")) == expected


@pytest.mark.parametrize("ref", ["jpg", "JPG", "000.jpg", "images/000.JPG", "elsewhere/name.jpeg"])
def test_references_find_their_member(ref):
    record = parse_members(members(llava("<image>Why?", "So.", image=ref), jpg=b""), key="d/000")
    assert record.media == (MediaRef("image", "jpg"),)


def test_members_are_the_media_of_a_record_that_names_none():
    sample = members(llava("<image>Why? <video>", "So."), **{"0__png": b"", "1__mp4": b""})
    record = parse_members(sample, key="0")
    assert turns(record)[0] == ("user", 0, "Why? ", 1)
    assert record.media == (MediaRef("image", "0.png"), MediaRef("video", "1.mp4"))
    assert parse_members(members(chat([{"type": "image"}], "So."), jpg=b""), key="0").media[0].ref == "jpg"
    assert parse_members(members(llava("<image>\nWhat?", "So."), mp4=b""), key="0").media[0].ref == "mp4"


def test_text_only_tar_samples_need_no_media():
    assert parse_members(members(llava("The <image> tag?", "So.")), key="0").media == ()


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (members(llava("<image>", "So.", image="b.jpg")), "missing_media"),
        (members(llava("<image>", "So.", image="b.jpg"), mp4=b""), "missing_media"),
        (members(llava("<image>", "So.", image="b.jpg"), **{"0__jpg": b"", "1__jpg": b""}), "missing_media"),
        (members(llava("<image><image>", "So.", image=["b.jpg", "c.jpg"]), jpg=b""), "missing_media"),
        (members(llava("<image><image>", "So."), jpg=b""), "placeholder_mismatch"),
        (members(jpg=b""), "bad_record"),
        (members(txt=b"A dog."), "bad_record"),
        (members(txt=b"A dog.", mp4=b""), "bad_record"),
        (members(txt=b"A dog.", **{"0__jpg": b"", "1__jpg": b""}), "bad_record"),
        (members(txt=b"\xff\xfe", jpg=b""), "bad_record"),
        (members(txt=b" \n", jpg=b""), "no_answer"),
        (members([1], jpg=b""), "bad_record"),
        (members(jpg=b"", json=b"{"), "bad_record"),
        (members(jpg=b"", json=b"[" * 100_000), "bad_record"),
        (members({"question_id": 1, "text": "Why?"}, jpg=b""), "no_answer"),
    ],
)
def test_unusable_tar_samples_are_named(sample, expected):
    with pytest.raises(SampleError) as error:
        parse_members(sample, key="0")
    assert error.value.reason == expected
