"""Canonical records read the quick way are what the parser that checks them gives; all else is left to it."""

import json
import random

import pytest

from eagle_train.data.canonical import canonical_messages
from eagle_train.data.schemas import parse_members
from eagle_train.types import SampleError
from tests.data.test_schemas import ONE_IMAGE, chat
from tests.data.test_too_long import random_samples

ANSWER = [{"type": "text", "text": "Because."}]
SLOT, WHY = {"type": "media", "index": 0}, {"type": "text", "text": "Why?"}
IMAGE = {"kind": "image", "member": "0.png"}


def parsed(record, members):
    contents = {**dict.fromkeys(members, b""), "json": json.dumps(record).encode()}
    return parse_members(contents, key="k")


def test_canonical_records_are_read_as_the_parser_reads_them():
    for _, record, files in random_samples(200):
        found = parsed(record, files)
        assert canonical_messages(record, len(found.media)) == found.messages
        assert record["meta"] == found.meta


def left_to_the_parser():
    yield "other shapes", [ONE_IMAGE[name] for name in ONE_IMAGE if name != "canonical"], ["a.jpg"]
    two = [IMAGE, {"kind": "image", "member": "1.png"}]
    swapped = [{"type": "media", "index": 1}, SLOT, WHY]
    yield "media out of order", [chat(swapped, ANSWER, media=two, meta={})], ["0.png", "1.png"]
    yield "an unlisted medium", [chat([WHY], ANSWER, media=[], meta={})], ["0.png"]
    yield "a system prompt", [chat([SLOT, WHY], ANSWER, media=[IMAGE], meta={}, system="Be brief.")], ["0.png"]
    yield "meta of another kind", [chat([SLOT, WHY], ANSWER, media=[IMAGE], meta=[1])], ["0.png"]
    yield "other typed parts", [chat([SLOT, {"type": "text", "value": "Why?"}], ANSWER, media=[IMAGE], meta={})], []
    human = chat([SLOT, WHY], ANSWER, media=[IMAGE], meta={})
    human["messages"][0]["role"] = "human"
    yield "other roles", [human], ["0.png"]


@pytest.mark.parametrize(("what", "records", "members"), list(left_to_the_parser()), ids=lambda value: str(value)[:20])
def test_what_needs_a_closer_look_is_left_to_the_parser(what, records, members):
    for record in records:
        try:
            count = len(parsed(record, members).media)
        except SampleError:  # such as a medium that has no member here
            count = 1
        assert canonical_messages(record, count) is None, what


def test_a_record_that_was_broken_since_is_left_to_the_parser():
    rng = random.Random(3)
    whole = chat([SLOT, WHY], ANSWER, media=[IMAGE], meta={})
    for broken in (None, 7, "text", [], {}, [{}], {"content": 3}):
        for place in ("messages", "turn", "content", "part"):
            record = json.loads(json.dumps(whole))
            turn = rng.choice(record["messages"])
            if place == "messages":
                record["messages"] = broken
            elif place == "turn":
                record["messages"][0] = broken
            elif place == "content":
                turn["content"] = broken
            else:
                turn["content"][-1] = broken
            try:
                found = parsed(record, ["0.png"])
            except SampleError:
                assert canonical_messages(record, 1) is None or broken in ([], {}), (place, broken)
            else:
                assert canonical_messages(record, 1) in (None, found.messages)
