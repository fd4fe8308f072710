"""Indexes of whole sources, built by processes together."""

import pytest

from eagle_train.data.catalog import Source
from eagle_train.data.index import ensure_index, has_index
from eagle_train.data.index_jobs import ensure_all, make_works
from eagle_train.data.shards import write_shards
from tests.data.test_bad_samples import GOOD


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_missing_is_built_by_every_number_of_workers_alike(tmp_path, workers):
    shards = write_shards(GOOD[:12], tmp_path / "s", samples_per_shard=3)
    index_dir = tmp_path / "index"
    ensure_index(shards[1], index_dir)
    works = make_works([[Source(name="s", shards=shards, index_dir=index_dir)]], laid_out=False)
    counts = []
    ensure_all(works, workers=workers, progress=counts.append)
    assert sum(counts) == 4 and len(list(index_dir.iterdir())) == 4
    assert all(has_index(shard, index_dir) for shard in shards)
    ensure_all(works, workers=workers, progress=counts.append)
    assert counts[-1] == 4, "all there at the first look"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    shards = write_shards(GOOD[:2], tmp_path / "s")
    (tmp_path / "blocked").write_text("")
    works = make_works([[Source(name="s", shards=shards, index_dir=tmp_path / "blocked")]], laid_out=False)
    with pytest.raises(ValueError, match=r"s-s-000000.*set index_dir"):
        ensure_all(works, workers=1, progress=lambda count: None)
