"""The index says what is in a shard, what is wrong with it, and that it changed."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from eagle_train.data.index import ensure_index, has_index, index_path, index_shard
from eagle_train.data.indexed_samples import read_sample
from eagle_train.data.shard_reader import ShardReader
from eagle_train.data.shards import write_shards
from eagle_train.data.storage import open_shard
from eagle_train.data.tables import read_metadata, read_table


def picture(kind="JPEG", size=(40, 30), seed=0, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def record(answer="yes", member="0.jpg"):
    content = [{"type": "media", "index": 0}, {"type": "text", "text": "what?"}]
    answer = [{"type": "text", "text": answer}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "media": [{"kind": "image", "member": member}], "meta": {}}


def samples(count=5, **options):
    return [(f"s{i}", record(), {"0.jpg": picture(seed=i, **options)}) for i in range(count)]


def tar(path, files):
    """Writes a tar of (name, content) files; returns its path."""
    with tarfile.open(path, "w") as out:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


def rows(shard):
    return read_table(ensure_index(shard)).to_pylist()


def digest(shard):
    return read_metadata(ensure_index(shard))[b"digest"]


def test_a_sample_is_found_again_by_its_row(tmp_path):
    (shard,) = write_shards(samples(), tmp_path / "s")
    reader = open_shard(shard)
    for number, row in enumerate(rows(shard)):
        assert row["key"] == f"s{number}" and row["reason"] is None
        sample = read_sample(reader, "src", row)
        assert sample.key == f"src/s-000000/s{number}"
        (medium,) = sample.media
        assert (medium.kind, medium.member, medium.width, medium.height, medium.orientation) == (
            "image",
            "0.jpg",
            40,
            30,
            1,
        )
        member = next(member for member in row["members"] if member["name"] == "0.jpg")
        assert reader.read_range(member["offset"], member["size"]) == picture(seed=number)


def test_sizes_are_as_stored_beside_the_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (shard,) = write_shards([("a", record(), {"0.jpg": picture(exif=exif)})], tmp_path / "s")
    (medium,) = rows(shard)[0]["media"]
    assert (medium["width"], medium["height"], medium["orientation"]) == (40, 30, 6)


@pytest.mark.parametrize(("before", "heads"), [(0, [1 << 12]), (9000, [1 << 12, 1 << 16])])
def test_of_a_large_jpeg_only_the_head_is_read(tmp_path, monkeypatch, before, heads):
    data = picture(size=(400, 400), quality=95)
    comment = b"\xff\xfe" + (before + 2).to_bytes(2, "big") + b"c" * before
    data = data[:2] + comment + data[2:]
    (shard,) = write_shards([("a", record(), {"0.jpg": data})], tmp_path / "s")
    asked = []
    read_range = ShardReader.read_range
    monkeypatch.setattr(
        ShardReader, "read_range", lambda self, at, size: asked.append((at, size)) or read_range(self, at, size)
    )
    (row,) = index_shard(shard).to_pylist()
    place = next(member for member in row["members"] if member["name"] == "0.jpg")
    inside = [size for at, size in asked if place["offset"] <= at < place["offset"] + place["size"]]
    assert len(data) > 1 << 17 and inside == heads and row["media"][0]["width"] == 400


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_large_images_of_other_formats_are_known_too(tmp_path, kind):
    data = picture(kind, size=(300, 200), **({"lossless": True} if kind == "WEBP" else {}))
    name = f"0.{kind.lower()}"
    (shard,) = write_shards([("a", record(member=name), {name: data})], tmp_path / "s")
    (row,) = rows(shard)
    assert len(data) > 1 << 16 and (row["media"][0]["width"], row["media"][0]["height"]) == (300, 200)


@pytest.mark.parametrize("cut", [0.999, 0.7, 0.5, 0.21, 0.01])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_whole_samples_before_the_damage_are_kept_and_the_rest_is_bad(tmp_path, cut, has_manifest):
    """Each that is gone is a row of its own where a manifest tells how many there were, else one row is all of them."""
    (shard,) = write_shards(samples(), tmp_path / "s")
    if not has_manifest:
        (tmp_path / "s" / "shards.json").unlink()
    whole = rows(shard)
    ends = [max(m["offset"] + m["size"] for m in row["members"]) for row in whole]
    length = int(ends[-1] * cut)
    shard.write_bytes(shard.read_bytes()[:length])
    found = rows(shard)
    good = [row for row in found if row["reason"] is None]
    bad, *more = found[len(good) :]
    surely = sum(end <= length for end in ends)
    assert len(more) == (len(whole) - len(good) - 1 if has_manifest else 0)
    assert all(row == bad | {"key": row["key"]} for row in more)
    assert [row["key"] for row in more] == [f"{bad['key']}, sample {n}" for n in range(len(good) + 2, len(found) + 1)]
    assert good == whole[: len(good)] and surely - 1 <= len(good) <= surely < 5
    assert bad["reason"] == "missing_shard" and not bad["members"] and not bad["media"]
    offset = -(-ends[len(good) - 1] // 512) * 512 if good else 0
    assert f"from byte {offset} on, after {len(good)} whole samples" in bad["detail"]


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    (shard,) = write_shards(samples(), tmp_path / "s")
    whole = rows(shard)
    place = min(member["offset"] for member in whole[3]["members"]) - 512
    data = bytearray(shard.read_bytes())
    data[place : place + 100] = b"\xab" * 100
    shard.write_bytes(data)
    found = rows(shard)
    good = [row for row in found if row["reason"] is None]
    bad = found[len(good)]
    assert good == whole[: len(good)] and len(good) in (2, 3) and len(found) == len(whole)
    assert bad["reason"] == "missing_shard" and f"at byte {place}" in bad["detail"]


def test_no_tar_at_all_is_one_bad_row(tmp_path):
    shard = tmp_path / "x.tar"
    for content in (b"", b"not a tar" * 200):
        shard.write_bytes(content)
        (row,) = rows(shard)
        assert row["reason"] == "missing_shard" and "from byte 0 on, after 0 whole samples" in row["detail"]


def test_what_nobody_knows_how_to_mean_is_a_bad_record(tmp_path):
    text = json.dumps(record()).encode()
    good = [("a.json", text), ("a.0.jpg", picture())]
    twice = [("b.json", text), ("b.0.jpg", picture()), ("b.0.jpg", picture(seed=1))]
    shard = tar(tmp_path / "x.tar", [*good, *twice, ("c.json", text), *good, ("d.json", b"{"), ("d.0.jpg", picture())])
    found = [(row["key"], row["reason"]) for row in rows(shard)]
    assert found == [
        ("a", None),
        ("b", "bad_record"),
        ("c", "missing_media"),
        ("a", "bad_record"),
        ("d", "bad_record"),
    ]
    details = [row["detail"] for row in rows(shard)]
    assert "'0.jpg' occurs twice" in details[1] and "the key occurs twice in this shard" in details[3]


def test_members_that_hold_neither_text_nor_media_are_not_read(tmp_path, monkeypatch):
    files = [("a.json", json.dumps(record()).encode()), ("a.0.jpg", picture()), ("a.npy", bytes(5000))]
    shard = tar(tmp_path / "x.tar", files)
    names = []
    read = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, member: names.append(member.name) or read(self, member))
    (row,) = index_shard(shard).to_pylist()
    assert sorted(names) == ["0.jpg", "json"] and len(row["members"]) == 3 and row["reason"] is None


def test_an_index_is_built_once_and_again_when_damaged_or_when_the_shard_changed(tmp_path):
    (shard,) = write_shards(samples(), tmp_path / "s")
    path = ensure_index(shard)
    assert path == index_path(shard, None) == tmp_path / "s" / "s-000000.index.arrow"
    first = path.stat().st_mtime_ns
    assert ensure_index(shard).stat().st_mtime_ns == first
    data = path.read_bytes()
    for content in (b"", data[: len(data) // 2], b"x" * len(data)):
        path.write_bytes(content)
        assert not has_index(shard, None)
        assert ensure_index(shard).read_bytes() == data
    write_shards(samples(3), tmp_path / "s")
    assert len(rows(shard)) == 3


def test_the_digest_names_content_and_nothing_else(tmp_path):
    (shard,) = write_shards(samples(), tmp_path / "s")
    (same,) = write_shards(samples(), tmp_path / "other")
    assert digest(shard) == digest(same)
    changed = {
        "key": [("x", *samples()[0][1:]), *samples()[1:]],
        "text of equal length": [("s0", record("yep"), samples()[0][2]), *samples()[1:]],
        "media size": samples(quality=60),
        "order": samples()[::-1],
        "fewer": samples(4),
        "reason": [("s0", record(), {"0.jpg": bytes(len(picture()))}), *samples()[1:]],
    }
    digests = {name: digest(write_shards(content, tmp_path / name)[0]) for name, content in changed.items()}
    assert len({digest(shard), *digests.values()}) == 1 + len(changed)


def test_old_index_files_are_ignored(tmp_path):
    (shard,) = write_shards(samples(1), tmp_path / "s")
    old = shard.with_suffix(".index.parquet")
    old.write_bytes(b"of another form")
    assert len(rows(shard)) == 1 and old.read_bytes() == b"of another form"


def test_a_remote_shard_needs_a_folder_for_its_index(tmp_path):
    with pytest.raises(ValueError, match="set index_dir"):
        index_path("s3://bucket/set/a.tar", None)
    assert index_path("s3://bucket/set/a.tar", tmp_path) == tmp_path / "set-a.index.arrow"
