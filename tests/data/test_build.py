"""Building shards from annotations and tars: every record is written or named, and shards appear whole or not."""

import io
import json
import tarfile
from contextlib import contextmanager
from functools import partial

import pytest
from PIL import Image

from eagle_train.data import build
from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.index import index_shard
from eagle_train.data.media_store import MediaFolder
from eagle_train.data.pieces import AnnotationRecords, Piece, build_piece
from eagle_train.data.schemas import parse_members
from eagle_train.data.shards import scan_shard
from eagle_train.data.split import Selector, split_annotation
from eagle_train.data.storage import open_shard


def progress_into(counts):
    """Progress that notes title, total and how many were done at a time."""

    @contextmanager
    def progress(title, total):
        yield lambda count: counts.append((title, total, count))

    return progress


build_from_annotation = partial(build.build_from_annotation, progress=progress_into([]))
build_from_tars = partial(build.build_from_tars, progress=progress_into([]))


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "png")
    return buffer.getvalue()


def llava(i, **fields):
    turns = [{"from": "human", "value": f"<image>\nQ{i}"}, {"from": "gpt", "value": f"A{i}"}]
    return {"id": i, "conversations": turns, "image": f"images/{i}.PNG"} | fields


@pytest.fixture
def source(tmp_path):
    """A folder with ten images and an annotation that names them."""
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    for i in range(10):
        (folder / "images" / f"{i}.PNG").write_bytes(picture((i, 0, 0)))
    write(folder / "a.json", [llava(i) for i in range(10)])
    return folder


def write(path, records):
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1))
    return path


def contents(shards):
    """Key, record and media bytes of every sample, as training reads them."""
    found = []
    for shard in shards:
        reader = open_shard(shard)
        for key, members in scan_shard(shard):
            data = {member.name: reader.read(member) for member in members}
            record = parse_members(data, key=key)
            found.append((key, record, [data[name] for ref in record.media for name in ref.paths]))
        reader.close()
    return found


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["b.json", "b.jsonl"])
def test_annotations_become_shards_with_their_media_byte_for_byte(source, tmp_path, name):
    counts = []
    annotation = write(source / name, [llava(i) for i in range(10)])
    report = build_from_annotation(
        tmp_path / "out", annotation=annotation, samples_per_shard=4, progress=progress_into(counts)
    )
    assert (report.read, report.written, report.errors) == (10, 10, ())
    assert counts == [*[(f"reading {name}", None, 1)] * 10, *[("writing out", 10, n) for n in (0, 4, 4, 2)]]
    assert [path.name for path in report.shards] == [f"out-00000{i}.tar" for i in range(3)]
    samples = contents(report.shards)
    assert [key for key, _, _ in samples] == [f"{i:08d}" for i in range(10)]
    for i, (_, record, media) in enumerate(samples):
        assert [message.content for message in record.messages] == [(0, f"\nQ{i}"), (f"A{i}",)]
        assert media == [(source / "images" / f"{i}.PNG").read_bytes()] and record.meta == {"id": i}
        assert [ref.ref for ref in record.media] == ["0.png"]
    assert [index_shard(shard)["reason"].null_count for shard in report.shards] == [4, 4, 2]


def test_bad_records_are_left_out_counted_and_named(source, tmp_path):
    records = [llava(i) for i in range(10)]
    records[2] = {"prompt": "?"}
    records[5] = llava(5, image="images/absent.png")
    records[7] = llava(7, image="../secret.png")
    report = build_from_annotation(tmp_path / "out", annotation=write(source / "b.jsonl", records), max_bad_share=0.3)
    named = [(error.key, error.reason) for error in report.errors]
    assert named == [("00000002", "bad_record"), ("00000005", "missing_media"), ("00000007", "bad_record")]
    assert report.read == report.written + len(report.errors) == 10
    assert [key for key, _, _ in contents(report.shards)] == [f"{i:08d}" for i in (0, 1, 3, 4, 6, 8, 9)]


def test_too_many_bad_records_leave_no_data_set(source, tmp_path):
    records = [llava(i, image="absent.png") if i < 2 else llava(i) for i in range(10)]
    annotation = write(source / "b.json", records)
    with pytest.raises(TooManyBadSamples, match=r"2 of 10 .*2 missing_media.*max_bad_share=0.19") as error:
        build_from_annotation(tmp_path / "out", annotation=annotation, max_bad_share=0.19)
    assert [bad.key for bad in error.value.errors] == ["00000000", "00000001"]
    assert not (tmp_path / "out").exists()
    assert build_from_annotation(tmp_path / "out", annotation=annotation, max_bad_share=0.2).written == 8


def test_a_set_without_one_good_record_is_refused_at_any_share(source, tmp_path):
    with pytest.raises(TooManyBadSamples, match=r"1 of 1 .* so nothing is left of it"):
        build_from_annotation(tmp_path / "out", annotation=write(source / "b.json", [{}]), max_bad_share=1.0)


@pytest.mark.parametrize("line", [b"{not json}", b"\xff\xfe", b"[" * 100_000, b'"text"', b'{"caption": "\\ud800"}'])
def test_a_broken_line_is_one_bad_record(source, tmp_path, line):
    good = json.dumps(llava(0)).encode()
    (source / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + line + b"\r\n" + good)
    report = build_from_annotation(tmp_path / "out", annotation=source / "b.jsonl", max_bad_share=0.5)
    assert (report.read, report.written) == (3, 2)
    assert [(error.key, error.reason) for error in report.errors] == [("00000001", "bad_record")]


def test_text_that_cannot_be_written_is_a_bad_record_wherever_it_is(source, tmp_path):
    annotation = write(source / "b.jsonl", [llava(0), llava(1, note="\ud800")])
    report = build_from_annotation(tmp_path / "out", annotation=annotation, max_bad_share=0.5)
    assert [(error.key, error.reason) for error in report.errors] == [("00000001", "bad_record")]


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("../secret.png", "bad_record"),
        ("images/../../secret.png", "bad_record"),
        ("{tmp}/secret.png", "bad_record"),
        ("file://{tmp}/secret.png", "bad_record"),
        ("http://127.0.0.1:9/a.png", "missing_media"),  # nobody listens
        ("s3://bucket/a.png", "bad_record"),
        ("data:image/png;base64,A", "unreadable_image"),
        ("images", "missing_media"),
        ("images/0.png\0", "missing_media"),
        ("x" * 5000, "missing_media"),
    ],
)
def test_references_that_are_no_file_under_the_root_are_refused(source, tmp_path, ref, reason):
    (tmp_path / "secret.png").write_bytes(picture("red"))
    annotation = write(source / "b.json", [llava(0), llava(1, image=ref.format(tmp=tmp_path))])
    report = build_from_annotation(tmp_path / "out", annotation=annotation, max_bad_share=0.5)
    assert [(error.key, error.reason) for error in report.errors] == [("00000001", reason)]


def test_media_are_found_under_the_root_by_any_honest_path(source, tmp_path):
    (source / "linked").symlink_to(source / "images")
    paths = ["images/0.PNG", "./images/0.PNG", "images/../linked/0.PNG", f"file://{source}/images/0.PNG"]
    annotation = write(tmp_path / "b.json", [llava(0, image=path) for path in [*paths, f"{source}/images/0.PNG"]])
    report = build_from_annotation(tmp_path / "out", annotation=annotation, media_root=source)
    assert [media for _, _, media in contents(report.shards)] == [[picture((0, 0, 0))]] * 5


def test_a_folder_that_holds_something_is_left_as_it_is(source, tmp_path):
    out = tmp_path / "out"
    build_from_annotation(out, annotation=source / "a.json")
    before = everything_in(out)
    with pytest.raises(ValueError, match="is not empty; delete it or choose another folder"):
        build_from_annotation(out, annotation=source / "a.json")
    assert everything_in(out) == before and sorted(p.name for p in tmp_path.iterdir()) == [".prepare", "out", "source"]


def test_shards_that_would_be_too_large_go_on_in_others(source, tmp_path):
    records = write(source / "r.jsonl", [llava(i) for i in range(10)])
    split_annotation(records, Selector({"s": None}), tmp_path, sources=["s"], records_per_piece=10, progress=abs)
    part = AnnotationRecords(tmp_path / "s" / "000000.jsonl", MediaFolder(source))
    piece = Piece(part, tmp_path / "s-000000.tar", tmp_path / "report.json")
    for max_bytes, sizes in ((600, [2, 2, 2, 2, 2]), (10**6, [10])):
        report = build_piece(piece, max_bytes)
        shards = sorted(tmp_path.glob("*.tar"))
        assert [path.name for path in shards] == list(report.shards) and list(report.shards.values()) == sizes
        assert len(list(tmp_path.glob("*.index.arrow"))) == len(sizes) and report.read == 10
        assert [key for key, _, _ in contents(shards)] == [f"{i:08d}" for i in range(10)]


@pytest.mark.parametrize("text", ["[]", "", '[{"a": 1},'])
def test_an_annotation_without_records_is_an_error(source, tmp_path, text):
    (source / "b.json").write_text(text)
    with pytest.raises(ValueError, match=r"b\.json"):
        build_from_annotation(tmp_path / "out", annotation=source / "b.json")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_nothing_and_all(source, tmp_path, share):
    with pytest.raises(ValueError, match="max_bad_share"):
        build_from_annotation(tmp_path / "out", annotation=source / "a.json", max_bad_share=share)


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars_become_canonical_shards_that_name_their_origin(tmp_path):
    red, blue = picture("red"), picture("blue")
    pair = {"000.png": red, "000.txt": b"Red.", "000.json": b'{"url": "u"}'}
    record = json.dumps(llava(1, image="d/001.Jpg")).encode()
    first = tar_of(tmp_path / "first.tar", pair)
    second = tar_of(tmp_path / "second.tar", {"d/001.jpg": blue, "d/001.json": record, "d/002.txt": b"No picture."})
    report = build_from_tars(tmp_path / "out", tars=[first, second], max_bad_share=0.5)
    assert (report.read, report.written) == (3, 2)
    assert [(error.key, error.reason) for error in report.errors] == [("second/d/002", "bad_record")]
    (key, caption, media), (other, talk, blues) = contents(report.shards)
    assert (key, other) == ("00000000", "00000001") and (media, blues) == ([red], [blue])
    assert [message.content for message in caption.messages] == [(0,), ("Red.",)]
    assert caption.meta == {"url": "u", "origin": "first/000"}
    assert [message.content for message in talk.messages] == [(0, "\nQ1"), ("A1",)]
    assert talk.media[0].ref == "0.jpg" and talk.meta == {"id": 1, "origin": "second/d/001"}


def test_canonical_shards_built_again_keep_conversations_and_media(source, tmp_path):
    first = build_from_annotation(tmp_path / "out", annotation=source / "a.json", samples_per_shard=3)
    again = build_from_tars(tmp_path / "again", tars=first.shards)
    assert len(first.shards) == 4 and len(again.shards) == 1
    before, after = contents(first.shards), contents(again.shards)
    assert [(key, record.messages, record.media, media) for key, record, media in before] == [
        (key, record.messages, record.media, media) for key, record, media in after
    ]


def test_a_cut_tar_fails_the_build(tmp_path):
    files = {f"{i}.{name}": data for i in range(30) for name, data in (("png", picture("red")), ("txt", b"Red."))}
    whole = tar_of(tmp_path / "whole.tar", files)
    assert build_from_tars(tmp_path / "fine", tars=[whole]).written == 30
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: 40 * 512 + 100])  # in a header
    with pytest.raises(ValueError, match=r"cut\.tar.* failed: .*is not a whole tar"):
        build_from_tars(tmp_path / "out", tars=[tmp_path / "cut.tar"], max_bad_share=1.0)
    assert not (tmp_path / "out").exists()
