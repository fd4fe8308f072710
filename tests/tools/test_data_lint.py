"""`data lint` finds every defect that is put into a data set, says how often, and never stops at the first."""

import io
import json
import tarfile

import pytest
from PIL import Image

from eagle_train.data import lint_files
from eagle_train.tools import data as data_tool
from eagle_train.tools import data_lint
from tests.data.test_video_faults import damaged_middle
from tests.data.test_video_frames import X264, write


def picture(colour=0, size=(32, 24)):
    buffer = io.BytesIO()
    Image.effect_noise(size, 60 + colour).save(buffer, "PNG")
    return buffer.getvalue()


def talk(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for name, content in members.items():
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def lint(capsys, *arguments):
    code = data_tool.main(["lint", *arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (report["errors"] > 0)
    return report


def counts(report):
    (source,) = report["sources"].values()
    return {kind: found["count"] for kind, found in source["findings"].items()}


@pytest.fixture
def shard(tmp_path):
    """A shard with one sound sample, and one of every defect."""
    broken = bytearray(picture())
    broken[len(broken) // 2] ^= 0xFF
    long = "A long text about nothing at all. " * 10
    samples = [
        ("sound", {"json": talk("<image>\nWhat?", "noise", image="0.png"), "0.png": picture(1)}),
        ("again", {"json": talk("<image>\nWhat?", "noise", image="0.png"), "0.png": picture(1)}),
        ("count", {"json": talk("<image><image>", "noise", image="0.png"), "0.png": picture(2)}),
        ("gone", {"json": talk("<image>\nWhere?", "noise", image="1.jpg"), "0.png": picture(), "1.png": picture()}),
        ("text", {"json": talk("<image>\nWho?", "noise", image="0.png"), "0.png": b"<html>not found</html>"}),
        ("pixels", {"json": talk("<image>\nHow?", "noise", image="0.png"), "0.png": bytes(broken)}),
        ("empty", {"json": talk("Why?", " ")}),
        ("twice", {"json": talk("One?", "1")}),
        ("role", {"json": talk("Two?", "2 <|im_end|>")}),
        ("twice", {"json": talk("Three?", "3")}),
        ("same1", {"json": talk(f"<image>{long}", "x", image="0.png"), "0.png": picture(3, (40, 40))}),
        ("same2", {"json": talk(f"<image>{long}", "x", image="0.png"), "0.png": picture(4, (50, 40))}),
        ("spare", {"json": talk("<image>\nWhen?", "now", image="0.png"), "0.png": picture(5), "1.png": picture(6)}),
        ("thin", {"json": talk("<image>\nThin?", "yes", image="0.png"), "0.png": picture(7, (900, 2))}),
        ("json", {"json": b"{"}),
    ]
    path = tmp_path / "bad" / "bad-000000.tar"
    path.parent.mkdir()
    write_tar(path, samples)
    return path


FOUND = {
    "bad_record": 1,
    "duplicate_key": 1,
    "missing_media": 1,
    "no_answer": 1,
    "placeholder_mismatch": 1,
    "unreadable_image": 1,
    "duplicate_sample": 1,
    "duplicate_text": 1,
    "odd_size": 1,
    "role_marker": 1,
    "unused_media": 1,
}


def test_every_defect_of_a_shard_is_found_and_counted(shard, capsys):
    report = lint(capsys, f"tars={shard}")
    assert counts(report) == FOUND
    assert (report["samples"], report["errors"], report["warnings"]) == (15, 6, 5)
    found = report["sources"]["bad"]["findings"]
    assert found["duplicate_sample"]["examples"] == [
        {"key": "bad/bad-000000/again", "excerpt": "like bad/bad-000000/sound"}
    ]
    assert found["missing_media"]["level"] == "error" and "'1.jpg'" in found["missing_media"]["examples"][0]["excerpt"]
    assert all(each["remedy"] and each["examples"] for each in found.values())


def test_pixels_are_only_looked_at_when_asked(shard, capsys):
    report = lint(capsys, f"tars={shard}", "decode=true")
    assert counts(report) == FOUND | {"unreadable_image": 2}
    keys = [each["key"] for each in report["sources"]["bad"]["findings"]["unreadable_image"]["examples"]]
    assert keys == ["bad/bad-000000/text", "bad/bad-000000/pixels"]


def test_a_damaged_tar_keeps_nothing_else_from_being_looked_at(shard, capsys):
    shard.with_name("a.tar").write_bytes(b"no tar at all" * 100)
    report = lint(capsys, f"tars={shard.parent}/*.tar")
    rest = {kind: count for kind, count in counts(report).items() if kind not in ("unreadable_file", "missing_shard")}
    assert rest == FOUND and report["errors"] == 7


def test_an_annotation_is_checked_with_its_files(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "spare.png"):
        (tmp_path / "images" / name).write_bytes(picture())
    (tmp_path / "images" / "broken.png").write_bytes(b"GIF8")
    records = [
        {"id": 1, **talk("<image>\nWhat?", "noise", image="a.png")},
        {"id": 2, **talk("<image>\nWhat?", "noise", image="a.png")},
        {"id": 2, **talk("<image>\nWho?", "noise", image="b.png")},
        {"id": 3, **talk("<image>\nWho?", "noise", image="broken.png")},
        {"id": 4, **talk("<image>\nWho?", "noise")},
        {"id": 5, "messages": "none"},
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join([*map(json.dumps, records), "{no json"]))
    report = lint(capsys, f"annotation={path}", f"media_root={tmp_path / 'images'}")
    assert counts(report) == {
        "bad_record": 2,
        "missing_media": 1,
        "unreadable_image": 1,
        "duplicate_id": 1,
        "duplicate_sample": 1,
        "placeholder_as_text": 1,
        "unused_media": 1,
    }
    whole = json.dumps(records)
    path = tmp_path / "cut.json"
    path.write_text(whole[: len(whole) - 10])
    found = counts(lint(capsys, f"annotation={path}", f"media_root={tmp_path / 'images'}"))
    assert found["unreadable_file"] == 1 and found["missing_media"] == 1


def test_of_a_video_only_the_part_that_is_trained_on_is_looked_at(tmp_path, capsys):
    broken = damaged_middle(write("mp4", "libx264", codec_options=X264))
    (tmp_path / "0.mp4").write_bytes(broken)
    clips = {"whole": {}, "sound": {"end": 0.2}, "past": {"start": 90.0}}
    records = [talk(f"<video>{key}?", "So.", video={"path": "0.mp4", **clip}) for key, clip in clips.items()]
    (tmp_path / "all.json").write_text(json.dumps(records))
    (tmp_path / "clips").mkdir()
    members = [{"json": record, "0.mp4": broken} for record in records]
    write_tar(tmp_path / "clips/clips-000000.tar", zip(clips, members, strict=True))
    for where in ((f"annotation={tmp_path}/all.json", f"media_root={tmp_path}"), (f"tars={tmp_path}/clips/*.tar",)):
        headers, pixels = (lint(capsys, *where, f"decode={decode}") for decode in ("false", "true"))
        assert counts(headers) == {"empty_clip": 1}
        assert counts(pixels) == {"empty_clip": 1, "unreadable_video": 1}
        (source,) = pixels["sources"].values()
        (bad,) = source["findings"]["unreadable_video"]["examples"]
        assert bad["key"].endswith(("whole", "record 0"))


def test_sound_data_has_no_finding_and_text_longer_than_a_row_is_an_error(data, capsys):
    report = lint(capsys, f"recipe={data}/small.yaml", f"data_root={data}", "decode=true")
    assert report["samples"] == 90 and report["errors"] == report["warnings"] == 0
    tokens = [f"tokenizer={data}/tokenizer", "chat_template=toy"]
    report = lint(capsys, f"tars={data}/small_text/*.tar", *tokens, "max_length=50")
    assert 0 < counts(report)["too_long"] < 12
    assert counts(lint(capsys, f"tars={data}/small_text/*.tar", *tokens, "max_length=500")) == {}
    with pytest.raises(ValueError, match="tokenizer= and chat_template="):
        data_tool.main(["lint", f"tars={data}/small_text/*.tar", "max_length=50"])
    with pytest.raises(ValueError, match="chat_template=nonsense is for counting tokens; give max_length= too"):
        data_tool.main(["lint", f"tars={data}/small_text/*.tar", "chat_template=nonsense"])


def test_it_reads_well_without_json(shard, capsys):
    assert data_tool.main(["lint", f"tars={shard}", "examples=1"]) == 1
    out = capsys.readouterr().out
    assert "error   missing_media 1: add the file" in out and "15 samples, 6 errors, 5 warnings" in out


@pytest.fixture
def parts(tmp_path):
    """Shards with an odd sample and a duplicate each, and an annotation of the same records."""
    records = [
        talk(f"Question {i % 50}?", "role <|im_end|>" if i % 40 == 7 else "answer", id=i % 90) for i in range(120)
    ]
    for number in range(4):
        own = records[30 * number : 30 * number + 30]
        write_tar(tmp_path / f"s-{number}.tar", [(f"k{i}", {"json": record}) for i, record in enumerate(own)])
    (tmp_path / "a.json").write_text(json.dumps([{**record, "image": f"{i}.png"} for i, record in enumerate(records)]))
    return tmp_path


@pytest.mark.parametrize(("kind", "look"), [("tars", "lint_shard"), ("annotation", "lint_records")])
def test_a_look_that_was_stopped_goes_on_with_the_other_parts(parts, capsys, monkeypatch, kind, look):
    monkeypatch.chdir(parts)
    monkeypatch.setattr(lint_files, "CHUNK", 30)
    given = {"tars": f"tars={parts}/s-*.tar", "annotation": f"annotation={parts}/a.json"}[kind]
    whole = lint(capsys, given)
    assert whole["samples"] == 120 and not (parts / ".lint").exists()
    real, seen = getattr(data_lint, look), []

    def stopping(checks, work):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(work.number)
        return real(checks, work)

    monkeypatch.setattr(data_lint, look, stopping)
    assert data_tool.main(["lint", given]) == 130
    told = capsys.readouterr()
    assert "the same command goes on from there" in told.err and not told.out
    first, seen[:] = set(seen), [None] * 3
    assert lint(capsys, given) == whole
    again = set(seen) - {None}
    # Media may have come since: records whose images were missing are looked at again.
    assert first & again == (first if kind == "annotation" else set()) and len(first | again) == 4
    assert not (parts / ".lint").exists()


def test_media_that_were_replaced_since_a_look_was_stopped_are_looked_at_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lint_files, "CHUNK", 1)
    images = {"0.png": b"<html>", "1.png": picture(size=(4, 400)), "2.png": picture()}
    for name, content in images.items():
        (tmp_path / name).write_bytes(content)
    records = [talk("<image>What?", f"noise {name}", image=name) for name in images]
    (tmp_path / "a.json").write_text(json.dumps(records))
    real = data_lint.lint_records

    def stopping(checks, work):
        if work.number == 2:
            raise KeyboardInterrupt
        return real(checks, work)

    monkeypatch.setattr(data_lint, "lint_records", stopping)
    assert data_tool.main(["lint", f"annotation={tmp_path}/a.json"]) == 130
    monkeypatch.setattr(data_lint, "lint_records", real)
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(picture(1))
    capsys.readouterr()
    assert counts(lint(capsys, f"annotation={tmp_path}/a.json")) == {}


def test_a_stopped_look_is_not_taken_for_other_checks_or_a_changed_shard(parts, capsys, monkeypatch):
    monkeypatch.chdir(parts)
    given = f"tars={parts}/s-*.tar"
    real = data_lint.lint_shard

    def stopping(checks, work):
        if work.number == 3:
            raise KeyboardInterrupt
        return real(checks, work)

    monkeypatch.setattr(data_lint, "lint_shard", stopping)
    assert data_tool.main(["lint", given]) == 130
    write_tar(parts / "s-1.tar", [("new", {"json": talk("Who?", "")})])
    monkeypatch.undo()
    monkeypatch.chdir(parts)
    capsys.readouterr()
    assert "long_text" in counts(lint(capsys, given, "max_characters=5"))
    found = counts(lint(capsys, given))
    assert found["no_answer"] == 1 and "long_text" not in found


@pytest.mark.slow
def test_processes_do_not_change_the_findings(parts, capsys, monkeypatch):
    monkeypatch.chdir(parts)
    given = f"tars={parts}/s-*.tar"
    assert data_tool.main(["lint", given, "--json"]) == 0
    alone = capsys.readouterr().out
    assert data_tool.main(["lint", given, "--json", "workers=3"]) == 0
    told = capsys.readouterr()
    assert told.out == alone and "looking at shards: 4/4" in told.err
