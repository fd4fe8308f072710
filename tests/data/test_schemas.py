"""Annotations in every accepted shape become the same conversation; defects are named, never repaired."""

import json
import math
import re

import pytest

from eagle_train.data.placeholders import MediaRef
from eagle_train.data.schemas import parse_members, parse_record, to_canonical
from eagle_train.types import SampleError

A, B, V = MediaRef("image", "a.jpg"), MediaRef("image", "b.jpg"), MediaRef("video", "v.mp4")


def llava(*texts, **fields):
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)], **fields}


def chat(*contents, **fields):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)], **fields}


def turns(record):
    return [(message.role, *message.content) for message in record.messages]


def parse(record):
    return parse_record(record, key="k")


def reason(record):
    with pytest.raises(SampleError) as error:
        parse(record)
    assert error.value.key == "k"
    return error.value.reason, error.value.detail


ONE_IMAGE = {
    "canonical": chat(
        [{"type": "media", "index": 0}, {"type": "text", "text": "\nWhy?"}],
        [{"type": "text", "text": "Because."}],
        media=[{"kind": "image", "member": "a.jpg"}],
        meta={"id": 7},
    ),
    "llava": llava("<image>\nWhy?", "Because.", image="a.jpg", id=7),
    "llava list": llava("<image>\nWhy?", "Because.", image=["a.jpg"], id=7),
    "llava without placeholder": llava("Why?", "Because.", image="a.jpg", id=7),
    "sharegpt": chat("<image>\nWhy?", "Because.", images=["a.jpg"], id=7),
    "openai": chat(
        [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "\nWhy?"}], "Because.", id=7
    ),
    "llamafactory v1": chat(
        [{"type": "image_url", "value": "a.jpg"}, {"type": "text", "value": "\nWhy?"}],
        [{"type": "text", "value": "Because."}],
        id=7,
    ),
    "qwen": chat(
        [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "\n"}, {"type": "text", "text": "Why?"}],
        "Because.",
        id=7,
    ),
    "typed with a list": chat(
        [{"type": "image"}, {"type": "text", "text": "\nWhy?"}], "Because.", images=["a.jpg"], id=7
    ),
    "eagle": llava("<image-1>\nWhy?", "Because.", data=[{"type": "image", "image_list": ["a.jpg"]}], id=7),
    "eagle without placeholder": llava("Why?", "Because.", data=[{"type": "image", "image_list": ["a.jpg"]}], id=7),
    "alpaca": {"instruction": "Why?", "input": "", "output": "Because.", "image": "a.jpg", "id": 7},
    "question": {"question": "<image>\nWhy?", "answer": "Because.", "image": "a.jpg", "id": 7},
}


@pytest.mark.parametrize("shape", ONE_IMAGE)
def test_every_shape_gives_the_same_record(shape):
    record = parse(ONE_IMAGE[shape])
    assert turns(record) == [("user", 0, "\nWhy?"), ("assistant", "Because.")]
    assert record.media == (A,) and record.meta == {"id": 7}


@pytest.mark.parametrize("shape", ONE_IMAGE)
def test_canonical_form_survives_a_round_trip(shape):
    record = parse(ONE_IMAGE[shape])
    canonical = json.loads(json.dumps(to_canonical(record, ["0.jpg"])))
    again = parse_members({"0.jpg": b"", "json": json.dumps(canonical).encode()}, key="k")
    assert (again.messages, again.meta) == (record.messages, record.meta)
    assert again.media == (MediaRef("image", "0.jpg"),) and to_canonical(again, ["0.jpg"]) == canonical


@pytest.mark.parametrize("field", ["caption", "text"])
def test_a_caption_answers_its_image_alone(field):
    record = parse({field: "A dog, <image> and all.", "image": "a.jpg", "url": "u"})
    assert turns(record) == [("user", 0), ("assistant", "A dog, <image> and all.")]
    assert record.media == (A,) and record.meta == {"url": "u"}


def test_media_are_in_reading_order_with_the_text_around_them_kept():
    record = parse(
        llava(" 1: <image>,\n2:<image>  ", "So.", "<video>Now?", "Yes.", image=["a.jpg", "b.jpg"], video="v.mp4")
    )
    assert turns(record)[0] == ("user", " 1: ", 0, ",\n2:", 1, "  ")
    assert turns(record)[2] == ("user", 2, "Now?") and record.media == (A, B, V)


def test_numbered_placeholders_name_their_medium():
    lists = [{"type": "image", "image_list": ["a.jpg", "b.jpg"]}, {"type": "video", "video_list": ["v.mp4"]}]
    record = parse(llava("<image-2> after <video-1> and <image-1>", "Yes.", data=lists))
    assert turns(record)[0] == ("user", 0, " after ", 1, " and ", 2) and record.media == (B, V, A)


def test_canonical_media_out_of_order_are_renumbered():
    content = [{"type": "media", "index": 1}, {"type": "text", "text": "or"}, {"type": "media", "index": 0}]
    media = [{"kind": "image", "member": "a.jpg"}, {"kind": "video", "member": "v.mp4"}]
    record = parse(chat(content, "Yes.", media=media))
    assert turns(record)[0] == ("user", 0, "or", 1) and record.media == (V, A)


def test_unplaced_media_go_before_the_first_user_turn():
    record = parse(chat("Why?", "So.", image=["a.jpg", "b.jpg"], system="Be brief."))
    assert turns(record) == [("system", "Be brief."), ("user", 0, "\n", 1, "\nWhy?"), ("assistant", "So.")]
    assert turns(parse(llava("", "So.", image="a.jpg")))[0] == ("user", 0)


def test_llava_video_writes_image_for_a_video():
    record = parse(llava("<image>\nWhat happens?", "Much.", video="v.mp4"))
    assert turns(record)[0] == ("user", 0, "\nWhat happens?") and record.media == (V,)


@pytest.mark.parametrize("nothing", ["", " ", "None", "none", "nan", None, math.nan, []])
def test_spellings_of_no_image(nothing):
    record = parse(llava("The tag is <image>.", "<video>", image=nothing))
    assert turns(record) == [("user", "The tag is <image>."), ("assistant", "<video>")] and record.media == ()
    assert "image" not in record.meta


def test_placeholders_beside_typed_media_are_text():
    content = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is <image> in HTML?"}]
    assert turns(parse(chat(content, "A tag.")))[0] == ("user", 0, "What is <image> in HTML?")


def test_system_and_observation_turns_are_kept():
    record = {"system": "Be brief.", "conversations": [
        {"from": "human", "value": "Call."},
        {"from": "gpt", "value": "f()"},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Three."},
    ]}  # fmt: skip
    assert [turn[0] for turn in turns(parse(record))] == ["system", "user", "assistant", "user", "assistant"]
    assert parse(record).meta == {}


def test_alpaca_input_follows_the_instruction():
    assert turns(parse({"instruction": "Add.", "input": "1 2", "output": "3"}))[0] == ("user", "Add.\n1 2")


@pytest.mark.parametrize(
    ("record", "numbers"),
    [
        (llava("<image><image>Why?", "So.", image="a.jpg"), "2 image .* 1 image"),
        (llava("<image>Why?", "So.", image=["a.jpg", "b.jpg"]), "1 image .* 2 image"),
        (llava("<image>Why?", "So.", image="a.jpg", video="v.mp4"), "0 video .* 1 video"),
        (llava("<video>Why?", "So.", image="a.jpg"), "0 image .* 1 image"),
        (llava("<image>Why?", "The <video> tag.", image="a.jpg"), "1 video .* 0 video"),
        (llava("<image-1><image-1>Why?", "So.", image=["a.jpg", "b.jpg"]), r"2 image .*\[1, 1\].* 2 image"),
        (llava("<image-2>Why?", "So.", image="a.jpg"), r"1 image .*\[2\].* 1 image"),
        (llava("<image><image-1>Why?", "So.", image=["a.jpg", "b.jpg"]), r"\[None, 1\]"),
        (chat([{"type": "image"}], "So."), "1 image .* 0 image"),
        (chat([{"type": "image", "image": "a.jpg"}], "So.", images=["b.jpg"]), "0 image .* 1 image"),
        (chat([{"type": "media", "index": 1}], "So.", media=[{"kind": "image", "member": "0.png"}]), r"\[2\]"),
        (
            chat([{"type": "media", "index": 0}] * 2, "So.", media=[{"kind": "image", "member": "0.png"}]),
            "2 media .* 1 media",
        ),
    ],
)
def test_placeholders_and_media_must_agree(record, numbers):
    found, detail = reason(record)
    assert found == "placeholder_mismatch"
    assert re.search(numbers, detail), detail


@pytest.mark.parametrize(
    "record",
    [
        llava(),
        llava("Why?"),
        llava("Why?", ""),
        llava("Why?", " \n", "And?", ""),
        chat("Why?", []),
        {"instruction": "Why?", "output": ""},
        {"caption": " ", "image": "a.jpg"},
        {"question_id": 1, "image": "a.jpg", "text": "Why?", "category": "conv"},
    ],
)
def test_records_without_an_answer_are_named_so(record):
    assert reason(record)[0] == "no_answer"


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"prompt": "Why?", "reply": "So."}, "['prompt', 'reply']; accepted are messages"),
        ({"text": "No image."}, "['text']"),
        ({"caption": "Two.", "images": ["a.jpg", "b.jpg"]}, "accepted are"),
        ({"question": "Why?"}, "accepted are"),
        (["Why?", "So."], "not list"),
        ({"messages": "Why?"}, "list of objects"),
        ({"messages": ["Why?", "So."]}, "list of objects"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "'bing'"),
        ({"messages": [{"text": "x"}]}, "['text']"),
        (chat("Why?", 7), "assistant turn is 7"),
        (chat("Why?", None), "must be a string"),
        (chat("Why?", "half \ud800"), "Unicode"),
        (chat([{"type": "audio", "audio": "x"}], "So."), "'audio'"),
        (chat([{"type": "text"}], "So."), "text part is None"),
        (chat([{"type": "media", "index": "0"}], "So."), "index '0'"),
        (chat([{"type": "image", "image": ["f1.jpg", "f2.jpg"]}], "So."), "image part holds"),
        (chat("Why?", "So.", media=[{"kind": "audio", "member": "0.wav"}]), "'audio'"),
        (chat("Why?", "So.", media=[{"kind": "image"}]), "media member holds"),
        (llava("Why?", "So.", image=7), "image holds 7"),
        (llava("Why?", "So.", image=["a.jpg", ""]), "image holds ''"),
        (llava("Why?", "So.", image="a.jpg", images=["a.jpg"]), "image, images"),
        (llava("Why?", "So.", data="x"), "data is 'x'"),
        ({"instruction": "Why?", "output": "So.", "history": [["a", "b"]]}, "history"),
        ({"instruction": "Why?", "output": "So.", "system": 3}, "system is 3"),
        (llava("Why?", "So.", "And?"), "last of 3 turns"),
        ({"messages": [{"role": "assistant", "content": "Hi."}]}, "turn 0"),
        ({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "assistant")]}, "turn 2"),
        ({"messages": [{"role": r, "content": "x"} for r in ("user", "user", "assistant")]}, "turn 1"),
        ({"messages": [{"role": r, "content": "x"} for r in ("user", "system", "assistant")]}, "turn 1"),
        (
            {"system": "s", "messages": [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]},
            "turn 1",
        ),
    ],
)
def test_malformed_records_are_bad_and_named(record, named):
    found, detail = reason(record)
    assert found == "bad_record" and named in detail


def test_canonical_form_needs_a_member_for_every_medium():
    with pytest.raises(ValueError, match="0 members for the 1 files"):
        to_canonical(parse(ONE_IMAGE["llava"]), [])
