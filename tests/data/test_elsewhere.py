"""Shards whose records hold media or name them elsewhere: planned and read as they are, within what is allowed."""

import base64
import io
import json
import tarfile

import pytest

from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.catalog import Source
from eagle_train.data.elsewhere import Elsewhere
from eagle_train.data.index import ensure_index, has_index, index_shard
from eagle_train.data.indexed_samples import open_sample
from eagle_train.data.lint import TextChecks
from eagle_train.data.lint_files import Checks, ShardWork, lint_shard
from eagle_train.data.loader import RowDataset
from eagle_train.data.media_content import read_content
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.data.retries import Retries, StorageError
from eagle_train.data.storage import Storage, open_shard
from eagle_train.data.tables import read_metadata, read_table
from eagle_train.types import MediaPlan, SampleError
from tests.catalogs import read_catalog
from tests.data.loads import row_of, tiny_encoder
from tests.data.range_server import serving
from tests.data.test_build import build_from_tars
from tests.data.test_build import contents as stored
from tests.data.test_index_media import picture
from tests.data.test_videos import video

RED, BLUE = picture(12, 9), picture(20, 10, "blue")


def chat(*parts):
    content = [*parts, {"type": "text", "text": "what is it?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}


def image(name, **wishes):
    return chat({"type": "image", "image": name, **wishes})


def held(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def write_tar(path, records):
    """Writes a shard of json members alone."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, record in enumerate(records):
            data = json.dumps(record).encode()
            info = tarfile.TarInfo(f"{number:03d}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def server():
    with serving() as server:
        server.files["b.png"] = BLUE
        yield server


@pytest.fixture
def root(tmp_path):
    """A media root with a picture and a video, and a picture beside it."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").write_bytes(RED)
    (tmp_path / "media" / "v.mp4").write_bytes(video(30))
    (tmp_path / "other.png").write_bytes(BLUE)
    return tmp_path / "media"


def rows_of(shard, media_root=None):
    return read_table(ensure_index(shard, media_root=media_root)).to_pylist()


def contents(shard, row, elsewhere):
    """Returns the bytes of a sample's media, all frames of lists."""
    sample, files = open_sample(open_shard(shard), "s", row, elsewhere)
    return read_content(files, sample.media, [MediaPlan(num_frames=len(m.members) or 1) for m in sample.media])


def test_every_form_is_in_a_row_of_a_shard_without_media_members(server, root, tmp_path, data):
    records = [
        image(held(RED), max_pixels=3136),
        image(server.url("b.png?size=large")),
        image(f"file://{root}/a.png"),
        image("a.png"),
        chat({"type": "video", "video": "v.mp4", "nframes": 3}),
        chat({"type": "video", "video": [held(RED), server.url("b.png"), "a.png"], "sample_fps": "2"}),
        {"caption": "yes", "image": held(RED)},
    ]
    shard = write_tar(tmp_path / "s" / "0.tar", records)
    encoder = tiny_encoder(data)
    catalog = read_catalog([Source(name="s", shards=[shard], media_root=root)], encoder, 400)
    assert [row["reason"] for row in rows_of(shard, root)] == [None] * len(records)
    batch = row_of(catalog, RowDataset(catalog, encoder), range(len(records)))
    assert batch.errors == () and len(batch.keys) == len(records)
    frames = [catalog.layout_of(number).num_frames for number in range(len(records))]
    assert frames == [0, 0, 0, 0, 3, 3, 0] and batch.num_images == 11
    colours = batch.pixels[:, :, 8, 8].tolist()
    red, blue = [255, 0, 0], [0, 0, 255]
    assert colours[:4] == [red, blue, red, red] and colours[7:] == [red, blue, red, red]


def test_a_member_comes_before_what_an_address_says(tmp_path):
    path = write_tar(tmp_path / "s" / "0.tar", [image("https://nowhere.invalid/a.png")])
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("000.png")
        info.size = len(RED)
        tar.addfile(info, io.BytesIO(RED))
    (row,) = rows_of(path)
    assert row["media"][0]["member"] == "png" and row["outside"] == []


@pytest.mark.parametrize(
    ("name", "reason", "said"),
    [
        ("file:///etc/hostname", "missing_media", "read only below a media_root"),
        ("/etc/hostname", "missing_media", "read only below a media_root"),
        ("../other.png", "missing_media", "read only below a media_root"),
        ("ftp://host/a.png", "bad_record", "is read no such way"),
        ("pipe:cat /etc/passwd", "missing_media", "read only below a media_root"),
        ("data:;base64,AAAA", "unreadable_image", "record/0"),
    ],
)
def test_without_a_media_root_no_file_of_this_machine_is_read(tmp_path, root, name, reason, said):
    (row,) = rows_of(write_tar(root / "0.tar", [image(name)]))
    assert (row["reason"], row["media"], row["outside"]) == (reason, [], []) and said in row["detail"]


@pytest.mark.parametrize(
    "name", ["../other.png", "file:///etc/hostname", "/etc/hostname", "file://{root}/../other.png"]
)
def test_no_path_leads_out_of_the_media_root(tmp_path, root, name):
    (row,) = rows_of(write_tar(tmp_path / "s" / "0.tar", [image(name.format(root=root))]), root)
    assert row["reason"] == "bad_record" and "leads out of media_root" in row["detail"]


def test_a_root_that_was_taken_away_is_asked_again_when_a_sample_is_read(tmp_path, root):
    shard = write_tar(tmp_path / "s" / "0.tar", [image("a.png")])
    (row,) = rows_of(shard, root)
    assert contents(shard, row, Elsewhere(root)) == [RED]
    with pytest.raises(SampleError, match=r"bad_record.*set media_root in the dataset card"):
        contents(shard, row, Elsewhere())
    assert has_index(shard, None, root) and not has_index(shard, None)
    (now,) = rows_of(shard)
    assert now["reason"] == "missing_media", "an index belongs to its root"


def test_what_changed_since_the_index_is_an_error_of_the_sample(server, root, tmp_path):
    shard = write_tar(tmp_path / "s" / "0.tar", [image(server.url("b.png")), image("a.png")])
    rows = rows_of(shard, root)
    digest = read_metadata(ensure_index(shard, media_root=root))[b"digest"]
    server.files["b.png"] = picture(20, 10, "green")  # as large, so that only the content tells
    (root / "a.png").write_bytes(BLUE)
    for row in rows:
        with pytest.raises(SampleError, match=r"changed_media.*is not what the index saw"):
            contents(shard, row, Elsewhere(root))
    (root / "a.png").unlink()
    with pytest.raises(SampleError, match="missing_media"):
        contents(shard, rows[1], Elsewhere(root))
    ensure_index(shard, media_root=root).unlink()
    (root / "a.png").write_bytes(BLUE)
    assert read_metadata(ensure_index(shard, media_root=root))[b"digest"] != digest, "a plan would be another one"


def test_a_server_that_fails_for_a_moment_is_asked_again_and_an_outage_is_no_bad_sample(server, tmp_path, data):
    shard = write_tar(tmp_path / "s" / "0.tar", [image(server.url("b.png")), image(server.url("gone.png"))])
    server.faults += [503, "drop"]
    rows = index_shard(shard, None, Elsewhere(retries=Retries(attempts=3, backoff_seconds=0.0))).to_pylist()
    assert [row["reason"] for row in rows] == [None, "missing_media"] and "404" in rows[1]["detail"]
    encoder = tiny_encoder(data)
    catalog = read_catalog([Source(name="s", shards=[shard])], encoder, 200)
    dataset = RowDataset(catalog, encoder, Storage(attempts=2, backoff_seconds=0.0))
    server.faults += [429]
    assert row_of(catalog, dataset, [0]).num_images == 1
    server.faults += [503, 503]
    with pytest.raises(StorageError, match=r"s/0/000.*2 attempts.*`data build`"):
        row_of(catalog, dataset, [0])


def test_an_outage_while_a_shard_is_indexed_stops_it(server, tmp_path):
    shard = write_tar(tmp_path / "s" / "0.tar", [image(held(RED)), image(server.url("b.png"))])
    server.faults += [503]
    with pytest.raises(StorageError, match="check the network"):
        index_shard(shard, None, Elsewhere(retries=Retries(attempts=1)))


def test_lint_tells_of_the_web_and_of_sizes(server, tmp_path):
    records = [image(server.url("b.png?token=secret")), image(held(RED), max_pixels=3136), image(held(RED))]
    shard = write_tar(tmp_path / "s" / "0.tar", records)
    part = lint_shard(Checks(texts=TextChecks()), ShardWork(0, "s", shard, None))
    found = {(key, finding.kind): finding.excerpt for key, finding in part.findings}
    assert found.keys() == {("s/0/000", "web_media"), ("s/0/001", "pixel_limits")}
    assert "secret" not in found["s/0/000", "web_media"] and "max_pixels 3136" in found["s/0/001", "pixel_limits"]


def test_data_build_stores_what_records_name(server, root, tmp_path):
    shard = write_tar(tmp_path / "s" / "0.tar", [image(server.url("b.png")), image(f"file://{root}/a.png"), image("x")])
    report = build_from_tars(tmp_path / "out", tars=[shard], media_root=root, max_bad_share=0.5)
    assert [media for _, _, media in stored(report.shards)] == [[BLUE], [RED]]
    assert [error.reason for error in report.errors] == ["missing_media"]
    with pytest.raises(TooManyBadSamples, match="read only below a media_root"):
        build_from_tars(tmp_path / "other", tars=[shard])


def test_a_recipe_names_the_media_root_beside_itself(tmp_path, root):
    write_tar(tmp_path / "s" / "0.tar", [image("a.png")])
    card = {"description": "d", "licence": "l", "origin": "o", "shards": "s/*.tar", "media_root": "media"}
    recipe = {"name": "own", "description": "d", "sources": {"own": {"repeat": 1}}, "datasets": {"own": card}}
    (tmp_path / "own.yaml").write_text(json.dumps(recipe))
    (source,) = recipe_sources(load_recipe(str(tmp_path / "own.yaml")), tmp_path / "elsewhere")
    assert source.media_root == root
