"""Files beside shards: two sets never share one, and what is stale or damaged is made again at the start."""

import errno

import numpy as np
import pytest

from eagle_train.data import byte_ranges, layout, lengths
from eagle_train.data.build_layouts import ensure_layouts
from eagle_train.data.catalog import Source
from eagle_train.data.layout import has_layout, texts_path
from eagle_train.data.ledger import RECORD, numbers, status_of
from eagle_train.data.loader import RowDataset, RowTask
from eagle_train.data.open_catalog import open_catalog
from eagle_train.data.replay import RecordedRow, rebuild
from eagle_train.data.retries import StorageError
from eagle_train.data.shards import write_shards
from eagle_train.data.storage import Storage
from eagle_train.data.too_long import DropTooLong
from eagle_train.train.books import ledger_shards
from eagle_train.train.stage_data import make_layout
from tests.catalogs import read_catalog
from tests.data.loads import tiny_encoder
from tests.data.test_bad_samples import GOOD


@pytest.fixture
def encoder(data):
    return tiny_encoder(data)


@pytest.fixture
def made(encoder):
    return make_layout(encoder, 64, DropTooLong())


def test_two_sets_that_would_share_an_index_are_refused(tmp_path, made):
    """Their folders are both called `train`: the texts of one would be trained on under the keys of the other."""
    one, other = (write_shards(GOOD[:3], tmp_path / name / "train")[0] for name in ("coco", "vg"))
    index = tmp_path / "index"
    with pytest.raises(ValueError, match=r"coco/train/\S+ and \S+vg/train/\S+ would both have the index .*index_dir"):
        ensure_layouts([(one, index, "a", None), (other, index, "b", None)], made)
    ensure_layouts([(one, index / "a", "a", None), (other, index / "b", "b", None)], made)
    ensure_layouts([(one, None, "a", None), (other, None, "b", None), (one, None, "c", None)], made)


def test_texts_of_another_version_and_damaged_ones_are_made_again(tmp_path, made, monkeypatch):
    (shard,) = write_shards(GOOD[:3], tmp_path / "s")
    items = [(shard, None, "s", None)]
    ensure_layouts(items, made)
    path = texts_path(shard, None, made.fingerprint)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert not has_layout(shard, None, made.fingerprint)
    ensure_layouts(items, made)
    assert path.read_bytes() == whole
    monkeypatch.setattr(lengths, "LENGTHS_VERSION", "next")
    assert not has_layout(shard, None, made.fingerprint)
    ensure_layouts(items, made)
    assert has_layout(shard, None, made.fingerprint) and path.read_bytes() != whole


def test_shards_are_indexed_with_the_settings_of_the_run(tmp_path, made, monkeypatch):
    (shard,) = write_shards(GOOD[:3], tmp_path / "s")
    tries = []

    def pread(descriptor, size, offset):
        tries.append(offset)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(byte_ranges.os, "pread", pread)
    with pytest.raises(StorageError, match="2 attempts"):
        layout.ensure_layout(shard, None, "s", made, storage=Storage(attempts=2, backoff_seconds=0))
    assert len(tries) == 2


def test_a_plan_knows_which_samples_are_in_quarantine(tmp_path, encoder, made):
    shards = write_shards(GOOD[:6], tmp_path / "s")
    ensure_layouts([(shard, None, "s", None) for shard in shards], made)
    listed = tmp_path / "quarantine.txt"
    identities = []
    for key, *_ in (GOOD[1], GOOD[2], GOOD[1]):
        listed.write_text(f"s/s-000000/{key}\n")
        found = open_catalog([Source(name="s", shards=shards)], made.fingerprint, quarantine=listed)
        identities.append(found.identity())
    assert identities[0] == identities[2] != identities[1]


def test_a_row_is_made_again_without_what_the_run_had_put_into_quarantine(tmp_path, encoder):
    found = read_catalog([Source(name="s", shards=write_shards(GOOD[:6], tmp_path / "s"))], encoder, 64)
    ran = RowDataset(found, encoder, left_out=frozenset({(0, 1)}))[RowTask(0, np.array([0, 1, 2]))]
    records = np.array([(5, status_of(use), 0, *numbers(use)) for use in ran.uses], RECORD)
    row = RecordedRow(row=0, rank=0, attempt=0, records=records, shards=ledger_shards(found))
    (rebuilt,) = rebuild([row], RowDataset(found, encoder), ledger_shards(found))
    assert rebuilt.differences == () and rebuilt.batch.keys == ran.keys and len(ran.keys) == 2
