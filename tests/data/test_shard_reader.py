"""Members of one sample come in one request, and a shard is told from another of its name."""

from eagle_train.data.index import shard_identity
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.storage import open_shard
from tests.data.range_server import serving
from tests.data.test_byte_ranges import CONTENT, Counting


def test_members_that_stand_close_are_read_at_once(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    file = Counting(tmp_path / "a.tar", gap_bytes=1000)
    members = [Member("far", 90_000, 50), Member("b", 2000, 500), Member("a", 600, 700), Member("empty", 2500, 0)]
    contents = ShardReader(file).read_members([*members, members[1]])
    assert contents == [CONTENT[m.offset : m.offset + m.size] for m in [*members, members[1]]]
    assert file.asked == [(600, 1900), (90_000, 50)]
    assert ShardReader(file).read_members([]) == []


def test_identity_tells_content_and_version(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    local = open_shard(path).identity()
    assert local.encode() == shard_identity(path)
    (tmp_path / "copy.tar").write_bytes(CONTENT)
    assert open_shard(tmp_path / "copy.tar").identity() == local, "a copy needs no new index"
    for changed in (CONTENT[:-1] + b"?", b"?" + CONTENT[1:], CONTENT + b"?", b""):
        path.write_bytes(changed)
        assert open_shard(path).identity() != local
    with serving(a=CONTENT) as server:
        for etag, requests in (('"1"', ["HEAD"]), ('W/"1"', ["HEAD", "GET", "GET"])):
            server.etag = etag
            server.requests.clear()
            first, again = (open_shard(server.url("a.tar")).identity() for _ in range(2))
            assert first == again and first.startswith(f"{len(CONTENT)}-")
            assert [method for method, _, _ in server.requests] == 2 * requests
            assert first.startswith(f"{local}-") == ("GET" in requests), "a checksum tells as much as the ends do"
            server.etag = etag.replace("1", "2")
            assert open_shard(server.url("a.tar")).identity() != first, "the middle may have changed"
