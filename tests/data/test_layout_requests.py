"""A start asks a storage for every shard once: whether it is there, and whether it is the one that was laid out."""

import pytest

from eagle_train.data.build_layouts import ensure_layouts
from eagle_train.data.catalog import Source
from eagle_train.data.open_catalog import open_catalog
from eagle_train.data.shards import write_shards
from eagle_train.data.too_long import DropTooLong
from eagle_train.train.stage_data import make_layout
from tests.data.loads import tiny_encoder
from tests.data.range_server import serving
from tests.data.test_bad_samples import GOOD

pytest.importorskip("aiohttp")


def ask(server, items, layout):
    """Returns the shards that are not there, and the requests that it takes to know."""
    server.requests.clear()
    lost = ensure_layouts(items, layout)
    return lost, sorted((method, path) for method, path, _ in server.requests)


def test_a_shard_is_asked_for_once(data, tmp_path):
    shards = write_shards(GOOD[:6], tmp_path / "s", samples_per_shard=3)
    encoder = tiny_encoder(data)
    layout = make_layout(encoder, 64, DropTooLong())
    with serving(**{shard.stem: shard.read_bytes() for shard in shards}) as server:
        items = [(server.url(shard.name), tmp_path / "index", "s", None) for shard in shards]
        asked = [("HEAD", shard.name) for shard in shards]
        assert ensure_layouts(items, layout) == frozenset()
        assert ask(server, items, layout) == (frozenset(), asked)
        lost = server.url("lost.tar")
        assert ask(server, [*items, (lost, tmp_path / "index", "s", None)], layout)[0] == {lost}

        gone = server.files.pop(shards[1].name)
        assert ask(server, items, layout)[0] == {items[1][0]}
        sources = [Source(name="s", shards=[item[0] for item in items], index_dir=tmp_path / "index")]
        found = open_catalog(sources, layout.fingerprint, max_bad_share=1.0, lost=[items[1][0]])
        assert found.dropped() == {"s": {"missing_shard": 1}}

        server.files[shards[1].name] = gone
        server.etag = '"2"'  # written again, perhaps otherwise
        _, requests = ask(server, items, layout)
        assert {path for method, path in requests if method == "GET"} == {shard.name for shard in shards}
        assert ask(server, items, layout)[1] == asked
