"""A run whose shards are on a web server trains on the rows of one whose shards are local."""

import shutil

import pytest
import yaml

from eagle_train.train.app import train
from tests.data.range_server import serving
from tests.runs import accounts, config, losses, rows

pytest.importorskip("aiohttp")


@pytest.mark.slow
def test_shards_behind_urls_give_the_rows_and_losses_of_local_ones(data, undisturbed, tmp_path):
    recipe = yaml.safe_load((data / "small.yaml").read_text())
    root = tmp_path / "data"
    root.mkdir()
    shutil.copytree(data / "tokenizer", root / "tokenizer")
    with serving() as server:
        for name, card in recipe["datasets"].items():
            shards = sorted((data / name).glob("*.tar"))
            server.files |= {f"{name}/{shard.name}": shard.read_bytes() for shard in shards}
            last = f"{len(shards) - 1:06d}"
            card["shards"] = server.url(f"{name}/{name}-{{000000..{last}}}.tar")
        (root / "small.yaml").write_text(yaml.safe_dump(recipe))
        cache = {"_target_": "eagle_train.data.shard_cache.ShardCache", "folder": str(tmp_path / "cache")}
        settings = ",".join(f"{key}:{value}" for key, value in (cache | {"max_bytes": 10**8}).items())
        for name, more in (("remote", ()), ("cached", (f"data.storage.cache={{{settings}}}", "data.num_workers=1"))):
            server.faults += ["drop", 503]  # asked again
            assert train(config(root, tmp_path / name, *more))
    assert list((tmp_path / "cache").rglob("*.tar*"))
    for name in ("remote", "cached"):
        assert rows(tmp_path / name) == rows(undisturbed)
        assert losses(tmp_path / name) == losses(undisturbed)
        assert accounts(tmp_path / name) == accounts(undisturbed)
