"""A tar's headers are read as `tarfile` reads them, and no damage goes by in silence."""

import gzip
import io
import random
import struct
import tarfile

import pytest

from eagle_train.data.index import index_shard
from eagle_train.data.shard_reader import Member
from eagle_train.data.shards import MAX_MEMBER_BYTES, repeated_member, scan_shard, split_name, write_shards
from eagle_train.data.storage import open_shard
from eagle_train.data.tar_headers import TarFile, tar_files

LONG = "folder/" + "n" * 150
SPLIT, FOREIGN = "p" * 90 + "/" + "q" * 90, "ü/日.png"
USTAR, GNU, PAX = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT


def tar_bytes(files, format=GNU, **info):
    """A tar of `(name, content)`; `info` are further fields of every header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            for field, value in info.items():
                setattr(header, field, value)
            tar.addfile(header, io.BytesIO(content))
    return out.getvalue()


def changed(data, at, new):
    """The tar with bytes of the header at 0 replaced, and its checksum made right."""
    header = bytearray(data[:512])
    header[at : at + len(new)] = new
    header[148:156] = b"%06o\0 " % (256 + sum(header) - sum(header[148:156]))
    return bytes(header) + data[512:]


def found(tmp_path, data):
    """What `tar_files` finds."""
    (tmp_path / "t.tar").write_bytes(data)
    return list(tar_files(open_shard(tmp_path / "t.tar").read_ahead()))


def expected(data):
    """What `tarfile` finds."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [TarFile(info.name, info.offset_data, info.size) for info in tar if info.isfile()]


def until_damage(tmp_path, data):
    """The keys of the samples before the damage, and what is said about it."""
    (tmp_path / "t.tar").write_bytes(data)
    keys, samples = [], scan_shard(tmp_path / "t.tar")
    with pytest.raises(ValueError, match=r"t\.tar") as error:
        for key, _ in samples:
            keys.append(key)
    return keys, str(error.value)


SAMPLES = [(f"{i}.{extension}", bytes([i]) * (300 * i)) for i in range(1, 6) for extension in ("jpg", "json")]


@pytest.mark.parametrize(
    ("format", "names"),
    [
        (USTAR, ["a.json", "d/b.x.jpg", "./c.txt", SPLIT, FOREIGN]),
        (GNU, ["a.json", LONG, SPLIT, FOREIGN, "b.txt"]),
        (PAX, ["a.json", LONG, SPLIT, FOREIGN, "b.txt"]),
    ],
)
def test_headers_are_read_as_tarfile_reads_them(tmp_path, format, names):
    data = tar_bytes([(name, bytes([k]) * 700 * k) for k, name in enumerate(names)], format)
    assert found(tmp_path, data) == expected(data) and [file.name for file in expected(data)] == names


def test_random_tars_are_read_as_tarfile_reads_them(tmp_path):
    draw = random.Random(0)
    for _ in range(30):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=draw.choice([GNU, PAX])) as tar:
            for k in range(draw.randrange(12)):
                header = tarfile.TarInfo("/".join("x" * draw.randrange(1, 120) for _ in range(draw.randrange(1, 4))))
                header.mtime, header.uname = draw.random() * 1e9, draw.choice(["", "naïve", "u" * 80])
                header.type = tarfile.DIRTYPE if k % 5 == 4 else tarfile.REGTYPE
                header.size = 0 if header.isdir() else draw.choice([0, 1, 511, 512, 513, 70_000])
                tar.addfile(header, io.BytesIO(bytes(header.size)))
        assert found(tmp_path, out.getvalue()) == expected(out.getvalue())


def test_old_tars_have_files_without_a_type_and_folders_with_a_slash(tmp_path):
    plain = tar_bytes([("a.txt", b"x" * 600)])
    v7 = changed(plain, 156, bytes(356))
    folder = changed(changed(tar_bytes([("a/", b"")]), 156, bytes(356)), 124, b"00000001000\0")
    assert found(tmp_path, v7) == expected(v7) == [TarFile("a.txt", 512, 600)]
    assert found(tmp_path, folder[:512] + v7) == [TarFile("a.txt", 1024, 600)], "a folder has no content"


def test_sizes_may_be_binary_or_in_a_pax_header(tmp_path):
    data = tar_bytes([("a.txt", b"x" * 600)])
    binary = changed(data, 124, b"\x80" + (600).to_bytes(11, "big"))
    assert found(tmp_path, binary) == expected(binary) == [TarFile("a.txt", 512, 600)]
    pax = tar_bytes([("a.txt", b"x" * 600)], PAX, pax_headers={"size": "600", "comment": "é"})
    zeroed = pax[:1024] + changed(pax[1024:], 124, b"00000000000\0")  # as writers do for 8 GiB and more
    assert found(tmp_path, zeroed) == expected(zeroed) == [TarFile("a.txt", 1536, 600)]


def test_checksums_of_signed_bytes_are_accepted(tmp_path):
    data = tar_bytes([("ü.txt", b"")])
    header = bytearray(data[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(struct.unpack("512b", header))
    signed = bytes(header) + data[512:]
    assert signed != data and found(tmp_path, signed) == expected(signed) == [TarFile("ü.txt", 512, 0)]


def test_names_that_are_no_utf8_stay_apart(tmp_path):
    data = b"".join(changed(tar_bytes([("aa.txt", b"")]), 0, bytes([byte]))[:512] for byte in (0xFF, 0xFE))
    names = [file.name for file in found(tmp_path, data)]
    assert names == ["\\xffa.txt", "\\xfea.txt"] and all(name.encode() for name in names)


@pytest.mark.parametrize("end", [0, 100, 512, 1024, 10240])
def test_an_end_mark_may_be_missing_if_the_last_member_is_whole(tmp_path, end):
    data = tar_bytes([("a.txt", b"x" * 512), ("b.txt", b"y" * 512)])
    assert [file.name for file in found(tmp_path, data[:2048] + bytes(end))] == ["a.txt", "b.txt"]
    assert found(tmp_path, tar_bytes([("a.txt", b"x")])[:513]) == [TarFile("a.txt", 512, 1)], "nor padding"


def test_a_tar_without_members_has_no_samples(tmp_path):
    assert found(tmp_path, tar_bytes([])) == []


def test_samples_before_a_cut_are_given_and_the_cut_is_an_error(tmp_path):
    data = tar_bytes(SAMPLES)
    files = expected(data)
    checked = set()
    for cut in range(1, files[-1].offset + files[-1].size, 97):
        whole = sum(file.offset + file.size <= cut for file in files)
        boundary = any(0 <= file.offset - 512 - cut < 512 for file in files)  # no more than padding is gone
        if boundary:
            continue
        keys, said = until_damage(tmp_path, data[:cut])
        assert keys == [str(i + 1) for i in range(max(0, (whole - 1) // 2))], "the last may lack members"
        assert "is not a whole tar" in said and f"of {cut})" in said
        checked.add(len(keys))
    assert checked == {0, 1, 2, 3, 4}


def test_no_bit_of_a_header_can_flip_in_silence(tmp_path):
    data = tar_bytes(SAMPLES)
    at = expected(data)[4].offset - 512
    draw = random.Random(0)
    for place in (0, 50, 124, 130, 150, 156, 257, 344, 500, *draw.sample(range(512), 20)):
        broken = bytearray(data)
        broken[at + place] ^= 1 << draw.randrange(7)
        if broken[at + 155] != data[at + 155] or broken[at + 154] != data[at + 154]:
            continue  # what ends the checksum's digits is not part of it
        keys, _ = until_damage(tmp_path, bytes(broken))
        assert keys == ["1"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is empty"),
        (gzip.compress(tar_bytes([("a.txt", random.Random(0).randbytes(9000))])), "it is compressed: unpack it"),
        (b"<html>Not found</html>" * 50, "no number"),
        (tar_bytes([("a.txt", b"x")]) + tar_bytes([("b.txt", b"x")]), "data follow the end mark"),
        (changed(tar_bytes([("a.txt", b"x" * 9)]), 124, b"0000000-001\0"), "no number"),
        (changed(tar_bytes([("a.txt", b"x" * 9)]), 124, b"\xff" * 12), "no number"),
        (changed(tar_bytes([("a.txt", b"x" * 9)]), 124, b"77777777777\0"), "8589934591 bytes"),
        (changed(tar_bytes([("a.txt", b"")]), 0, bytes(100)), "no sane name"),
        (changed(tar_bytes([(LONG, b"x")]), 124, b"00010000000\0"), "claims 2097152 bytes"),
        (changed(tar_bytes([(LONG, b"x")]), 124, b"00000100000\0"), "an extended header has"),
        (tar_bytes([(LONG, b"x")])[:1024], "announces is not there"),
        (tar_bytes([("ü", b"x")], PAX).replace(b" path=", b"=path "), "PAX header is broken"),
        (tar_bytes([("a", b"x")], PAX, pax_headers={"GNU.sparse.major": "1"}), "sparse"),
        (tar_bytes([("a", b"x")], PAX, pax_headers={"size": "-1"}), "the size b'-1'"),
    ],
)
def test_damage_is_named(tmp_path, data, said):
    keys, text = until_damage(tmp_path, data)
    assert keys == [] and said in text and "is not a whole tar" in text and "at byte" in text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a fifo"),
        (b"V", "of type b'V'"),
    ],
)
def test_what_is_no_plain_file_is_refused_and_what_follows_is_read(tmp_path, kind, said):
    samples = spoiled(tmp_path, tar_bytes([("l.jpg", b"")], type=kind, linkname="/" + "x" * 200))
    assert samples == {"1": "", "l": f"member 'l.jpg' is {said}; only plain files are read", "2": ""}


def test_content_that_a_link_claims_is_not_passed_over(tmp_path):
    link = changed(tar_bytes([("l.jpg", b"")], type=tarfile.LNKTYPE), 124, b"%011o\0" % 5000)
    assert spoiled(tmp_path, link)["2"] == ""
    (sample,) = (members for key, members in scan_shard(tmp_path / "t.tar") if key == "2")
    assert [member.size for member in sample] == [600, 600]


def test_a_sparse_file_ends_the_shard(tmp_path):
    data = tar_bytes(SAMPLES[:4])
    sparse = tar_bytes([("l.jpg", b"")], type=tarfile.GNUTYPE_SPARSE)
    keys, text = until_damage(tmp_path, data[: data.index(b"2.jpg")] + sparse)
    assert keys == [] and "'l.jpg' is a sparse file; only plain files are read" in text


def spoiled(tmp_path, member):
    """Why each sample of a tar is refused that has the headers of another tar between samples 1 and 2."""
    headers = member.rstrip(b"\0")
    headers += bytes(-len(headers) % 512)
    first, second = (tar_bytes(SAMPLES[i : i + 2]) for i in (0, 2))
    (tmp_path / "t.tar").write_bytes(first[: 4 * 512] + headers + second)
    return {
        key: "; ".join(filter(None, (m.refused for m in members))) for key, members in scan_shard(tmp_path / "t.tar")
    }


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "x/../a.jpg"])
@pytest.mark.parametrize("format", [GNU, PAX])
def test_path_tricks_are_refused(tmp_path, name, format):
    for path in (name, name.replace("a.jpg", "é" * 120 + ".jpg")):
        (tmp_path / "t.tar").write_bytes(tar_bytes([("1.jpg", b""), (path, b""), ("2.jpg", b"")], format))
        first, (_, [refused]), last = scan_shard(tmp_path / "t.tar")
        assert refused.refused == f"member {path!r} points outside the archive"
        assert [(key, member.refused) for key, [member] in (first, last)] == [("1", ""), ("2", "")]


def test_absurd_sizes_are_refused(tmp_path):
    with (tmp_path / "t.tar").open("wb") as file:  # sparse on the disk
        size = MAX_MEMBER_BYTES + 1
        file.write(changed(tar_bytes([("a.mp4", b"")]), 124, b"%011o\0" % size)[:512])
        file.seek(512 + -(-size // 512) * 512)
        file.write(tar_bytes([("b.jpg", b"x")]))
    (_, [first]), (key, [second]) = scan_shard(tmp_path / "t.tar")
    assert first.refused == f"member 'a.mp4' has {size} bytes (limit {MAX_MEMBER_BYTES})"
    assert (key, second.refused, second.size) == ("b", "", 1)


def test_members_are_grouped_by_key(tmp_path):
    names = ["a.JPG", "a.json", "./d/b.seg.png", "d//b.json", ".DS_Store", "d/._b.json", "d/b.txt", "readme"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "t.tar").write_bytes(out.getvalue())
    samples = [(key, [member.name for member in members]) for key, members in scan_shard(tmp_path / "t.tar")]
    assert samples == [("a", ["jpg", "json"]), ("d/b", ["seg.png", "json", "txt"]), ("readme", [""])]
    assert split_name("v1.0/a.x.jpg") == ("v1.0/a", "x.jpg")


def test_a_member_that_occurs_twice_is_one_bad_sample(tmp_path):
    shard = tmp_path / "t.tar"
    shard.write_bytes(tar_bytes([("a.txt", b"1"), ("b.jpg", b"1"), ("b.JPG", b"2"), ("b.json", b"{}"), ("c.txt", b"")]))
    repeated = {key: repeated_member(members) for key, members in scan_shard(shard)}
    assert repeated == {"a": None, "b": "jpg", "c": None}
    rows = {row["key"]: (row["reason"], row["detail"]) for row in index_shard(shard).to_pylist()}
    assert rows["b"][0] == "bad_record" and rows["b"][1].startswith("member 'jpg' occurs twice")
    assert list(rows) == ["a", "b", "c"]


def test_members_lead_to_their_bytes(tmp_path):
    (shard,) = write_shards([(f"k{i}", {"i": i}, {"0.png": bytes([i]) * 999}) for i in range(9)], tmp_path / "s")
    reader = open_shard(shard)
    samples = list(scan_shard(reader))
    assert [key for key, _ in samples] == [f"k{i}" for i in range(9)]
    for i, (_, members) in enumerate(samples):
        assert all(isinstance(member, Member) for member in members)
        contents = dict(zip((member.name for member in members), reader.read_members(members), strict=True))
        assert contents == {"json": b'{"i": %d}' % i, "0.png": bytes([i]) * 999}
