"""Media that records name by an address or hold themselves: read in every form, within limits, or named."""

import base64
import json

import pytest

from eagle_train.data import media_sources
from eagle_train.data.index import ensure_index, read_records
from eagle_train.data.media_sources import inline, read_address
from eagle_train.data.placeholders import MediaRef, media_kind
from eagle_train.data.retries import Retries
from eagle_train.data.schemas import parse_members, parse_prompt, parse_record, stored_names
from eagle_train.data.shards import write_shards
from eagle_train.data.storage import open_shard
from eagle_train.data.tables import read_table
from eagle_train.types import SampleError
from tests.data.range_server import serving
from tests.data.test_build import build_from_annotation, build_from_tars, contents, picture


def chat(*parts):
    content = [*parts, {"type": "text", "text": "Why?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "So."}]}


def address(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


RED = picture("red")


@pytest.fixture
def server():
    with serving() as server:
        server.files["red.png"] = RED
        yield server


def test_every_form_of_the_message_format_is_built_into_a_shard(server, tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    forms = [
        {"type": "image", "image": "red.png"},
        {"type": "image", "image": f"file://{tmp_path}/red.png"},
        {"type": "image_url", "image_url": {"url": server.url("red.png?size=large")}},
        {"type": "image_url", "image_url": address(RED)},
        {"type": "image", "image": address(RED, "image"), "max_pixels": 3136},  # as qwen-vl-utils has it
        {"type": "video", "video": [server.url("red.png"), "red.png", address(RED)], "fps": 2.0, "nframes": 3},
    ]
    (tmp_path / "a.json").write_text(json.dumps([chat(form) for form in forms]))
    report = build_from_annotation(tmp_path / "out", annotation=tmp_path / "a.json")
    assert report.errors == () and report.written == len(forms)
    found = contents(report.shards)
    assert [media for _, _, media in found] == [[RED]] * 5 + [[RED] * 3]
    names = [list(medium.paths) for _, record, _ in found for medium in record.media]
    assert names == [["0.png"]] * 4 + [["0.image"], ["0.0.png", "0.1.png", "0.2.png"]]
    rows = [row for shard in report.shards for row in read_table(ensure_index(shard)).to_pylist()]
    assert [row["reason"] for row in rows] == [None] * 6 and rows[4]["media"][0]["max_pixels"] == 3136
    assert rows[5]["media"][0]["duration"] == 1.5


def test_raw_bytes_are_media_too():
    ref = MediaRef("image", inline(RED))
    for value in (RED, {"bytes": RED, "path": "was/red.png"}, {"bytes": RED, "path": None}):
        assert parse_record(chat({"type": "image", "image": value}), key="k").media == (ref,)
    assert read_address(ref, "k") == RED and stored_names([ref]) == ["0.image"]


def test_shards_that_hold_media_in_their_records_are_built_into_ones_that_do_not(tmp_path):
    samples = [("0", chat({"type": "image", "image": address(RED)}), {})]
    (shard,) = write_shards(samples, tmp_path / "given")
    (row,) = read_table(ensure_index(shard)).to_pylist()
    assert row["media"][0]["member"] == "record/0" and row["outside"][0]["size"] == len(RED)
    report = build_from_tars(tmp_path / "out", tars=[shard])
    assert [media for _, _, media in contents(report.shards)] == [[RED]]
    (built,) = report.shards
    records = list(read_records(built, read_table(ensure_index(built))))
    assert records[0].media == (MediaRef("image", "0.png"),)
    assert open_shard(built).location == built


def test_a_member_of_the_kind_stands_for_an_address():
    record = chat({"type": "image", "image": "https://example.com/a.jpg"})
    members = {"jpg": b"", "json": json.dumps(record).encode()}
    assert parse_members(members, key="k").media == (MediaRef("image", "jpg"),)


@pytest.mark.parametrize(
    ("ref", "reason", "said"),
    [
        ("ftp://host/a.png", "bad_record", "'ftp://host/a.png' is read no such way"),
        ("data:image/png,plain", "unreadable_image", "only data:...;base64"),
        ("data:;base64,####", "unreadable_image", "is no base64"),
        ("data:;base64," + "A" * 4000, "unreadable_image", "more than 1000 bytes"),
        ("http://user:secret@127.0.0.1:9/a.png?token=secret", "missing_media", "if this machine has no network"),
        ("http://[", "missing_media", "cannot be fetched"),
    ],
)
def test_what_cannot_be_read_is_named_without_what_it_hides(ref, reason, said):
    with pytest.raises(SampleError) as error:
        read_address(MediaRef("image", ref), "k", max_bytes=1000)
    assert error.value.reason == reason and said in error.value.detail
    assert "secret" not in error.value.detail and len(error.value.detail) < 250


def test_a_server_that_fails_or_gives_too_much_is_an_error_of_the_sample(server, monkeypatch):
    monkeypatch.setattr(media_sources, "BRIEF", Retries(attempts=2, backoff_seconds=0.0))
    for name, max_bytes, reason in [("absent.png", 1 << 20, "missing_media"), ("red.png", 10, "unreadable_image")]:
        with pytest.raises(SampleError) as error:
            read_address(MediaRef("image", server.url(name)), "k", max_bytes=max_bytes)
        assert error.value.reason == reason
    server.faults += ["drop", "drop"]
    with pytest.raises(SampleError, match="missing_media"):
        read_address(MediaRef("image", server.url("red.png")), "k")
    server.faults += ["drop"]
    assert read_address(MediaRef("image", server.url("red.png")), "k", max_bytes=len(RED)) == RED


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("https://host/a.MP4?x=b.png#c", "video"),
        ("http://host/a.jpg", "image"),
        ("data:video/mp4;base64,AAAA", "video"),
        ("data:image/jpeg;base64,a.b", "image"),
        ("data:;base64,AAAA", None),
        ("https://host/watch?v=1", None),
    ],
)
def test_the_kind_of_an_address_is_told_by_its_path_or_type(name, kind):
    assert media_kind(name) == kind


def test_a_question_is_a_conversation_that_waits_for_its_answer():
    asked = parse_prompt(chat({"type": "image", "image": "a.png", "min_pixels": 9})["messages"][:1], key="k")
    assert [message.role for message in asked.messages] == ["user"]
    assert asked.media == (MediaRef("image", "a.png", limits=(("min_pixels", 9),)),)
    with pytest.raises(SampleError, match="the user first"):
        parse_prompt(chat()["messages"], key="k")
