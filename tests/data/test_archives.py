"""Published archives, whole or in parts, give each member's bytes by name."""

import gzip
import io
import tarfile
import zipfile

import pytest

from eagle_train.data.archives import Archive, ArchiveReader, Joined, clean_name, find_archives, index_archive

FILES = {f"coco/train/{i:03d}.jpg": bytes([i]) * (37 * i + 1) for i in range(40)}


def tar_bytes(files=FILES, prefix="./"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folder = tarfile.TarInfo(f"{prefix}coco")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo(f"{prefix}link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(files=FILES):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, (name, data) in enumerate(files.items()):
            archive.writestr(name, data, zipfile.ZIP_STORED if i % 2 else zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def write_parts(folder, stem, data, count, letters):
    size = -(-len(data) // count)
    for i in range(count):
        suffix = chr(97 + i // 26) + chr(97 + i % 26) if letters else str(i + 1)
        (folder / f"{stem}{suffix}").write_bytes(data[i * size : (i + 1) * size])


def only(folder, patterns=("*",)):
    (archive,) = find_archives(folder, patterns)
    return archive


def contents(archive, tables):
    reader = ArchiveReader(archive, tables)
    found = {name: reader.read(name) for name in FILES if reader.holds(name)}
    assert reader.read("coco/train/absent.jpg") is None and not reader.holds("link.jpg")
    reader.close()
    return found


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize(("count", "letters"), [(1, True), (3, True), (30, True), (12, False)])
def test_every_member_is_read_by_name_from_parts(tmp_path, kind, count, letters):
    data = {"tar": tar_bytes, "tar.gz": lambda: gzip.compress(tar_bytes()), "zip": zip_bytes}[kind]()
    if count == 1:
        (tmp_path / f"images.{kind}").write_bytes(data)
    else:
        write_parts(tmp_path, f"images.{kind}.part_" if letters else f"images.{kind}_part", data, count, letters)
    archive = only(tmp_path)
    assert (archive.name, len(archive.parts)) == (f"images.{kind}", count)
    seen = []
    assert index_archive(archive, tmp_path / "tables", seen.append) == (len(FILES), None)
    assert contents(archive, tmp_path / "tables") == FILES and sum(seen) >= len(FILES)


def test_what_is_compressed_is_seen_in_the_bytes_not_in_the_name(tmp_path):
    write_parts(tmp_path, "images.tar.part_", gzip.compress(tar_bytes()), 3, letters=True)
    archive = only(tmp_path)
    index_archive(archive, tmp_path / "tables", lambda count: None)
    assert contents(archive, tmp_path / "tables") == FILES


def test_an_index_is_made_once_and_again_when_the_archive_grew(tmp_path):
    data = tar_bytes()
    half = len(data) // 2
    (tmp_path / "x.tar.part_aa").write_bytes(data[:half])
    count, defect = index_archive(only(tmp_path), tmp_path / "tables", lambda count: None)
    assert 0 < count < len(FILES) and "ends early" in defect
    found = contents(only(tmp_path), tmp_path / "tables")
    assert 0 < len(found) < len(FILES) and all(FILES[name] == data for name, data in found.items())
    seen = []
    assert index_archive(only(tmp_path), tmp_path / "tables", seen.append) == (count, defect) and not seen
    (tmp_path / "x.tar.part_ab").write_bytes(data[half:])
    assert index_archive(only(tmp_path), tmp_path / "tables", seen.append) == (len(FILES), None) and seen
    assert contents(only(tmp_path), tmp_path / "tables") == FILES


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_compressed_archive_that_is_cut_off_gives_what_it_has(tmp_path, cut):
    files = {name: bytes(range(256)) * 40 + data for name, data in FILES.items()}
    data = gzip.compress(tar_bytes(files), compresslevel=0)
    (tmp_path / "x.tar.gz").write_bytes(data[: int(cut * len(data))])
    count, defect = index_archive(only(tmp_path), tmp_path / "tables", lambda count: None)
    assert 0 < count < len(FILES) and "ends early" in defect


@pytest.mark.parametrize("data", [b"", b"no archive" * 100, zip_bytes()[:-30]])
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.tar holds no files that can be read"):
        index_archive(only(tmp_path), tmp_path / "tables", lambda count: None)


def test_a_missing_part_is_named_by_the_part_after_it(tmp_path):
    write_parts(tmp_path, "x.tar.part_", tar_bytes(), 5, letters=True)
    (tmp_path / "x.tar.part_ac").unlink()
    with pytest.raises(ValueError, match=r"1 part\(s\) before x\.tar\.part_ad are missing"):
        find_archives(tmp_path, ["*"])


def test_archives_are_told_from_other_files(tmp_path):
    for name in ["b.tar", "a.zip", "sub/c.tgz", "data.json", "images.tar.md5", "part_aa", "x.tar_part1", "x.tar_part2"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [archive.name for archive in find_archives(tmp_path, ["*", "*/*"])] == [
        "a.zip",
        "b.tar",
        "sub/c.tgz",
        "x.tar",
    ]
    assert find_archives(tmp_path, ["*.txt"]) == []


def test_parts_read_like_the_whole(tmp_path):
    data = bytes(range(256)) * 10
    write_parts(tmp_path, "p", data, 7, letters=False)
    with io.BufferedReader(Joined([tmp_path / f"p{i + 1}" for i in range(7)])) as file:
        assert file.read() == data
        for start, count in [(0, 10), (360, 20), (365, 2000), (2550, 100), (5000, 1)]:
            file.seek(start)
            assert file.read(count) == data[start : start + count]
        file.seek(-5, io.SEEK_END)
        assert file.read() == data[-5:]


@pytest.mark.parametrize(
    ("name", "clean"), [("./a//b.jpg", "a/b.jpg"), ("/a/b", "a/b"), ("a\\b.jpg", "a/b.jpg"), ("../a", "../a")]
)
def test_paths_have_one_spelling(name, clean):
    assert clean_name(name) == clean


def test_a_member_that_vanished_since_is_an_error_not_other_bytes(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes())
    archive = Archive("x.tar", (path,))
    index_archive(archive, tmp_path, lambda count: None)
    path.write_bytes(tar_bytes()[:2000])
    reader = ArchiveReader(archive, tmp_path)
    with pytest.raises(OSError, match=r"039\.jpg has 0 of"):
        reader.read("coco/train/039.jpg")
    reader.close()
