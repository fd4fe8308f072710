"""Shards and records that break under the loader: each is named with key and shard, and the rest comes through."""

import os
import tarfile

import pytest

from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.catalog import Source
from eagle_train.data.loader import RowDataset
from eagle_train.data.shards import scan_shard, write_shards
from eagle_train.types import SampleError
from tests.catalogs import read_catalog
from tests.data.loads import digest, errors, jpeg, load, open_data, row_of, tiny_encoder
from tests.data.test_bad_samples import GOOD, png, record

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.fixture(scope="module")
def encoder(data):
    return tiny_encoder(data)


@pytest.fixture
def found(tmp_path, encoder):
    """The catalog of 20 good samples in 4 shards."""
    return open_data(tmp_path, GOOD, encoder)


def test_of_a_shard_cut_before_its_index_is_built_the_whole_samples_stay(tmp_path, encoder):
    shards = write_shards(GOOD, tmp_path / "s", samples_per_shard=5)
    os.truncate(shards[2], shards[2].stat().st_size // 2)
    source = Source(name="s", shards=shards)
    with pytest.raises(TooManyBadSamples, match=r"rest from byte \d+: missing_shard: .*s-000002\.tar is not"):
        read_catalog([source], encoder, 64, share=0.0)
    with pytest.raises(TooManyBadSamples, match=r"s: 4 of 20 samples are bad \(4 missing_shard\)"):
        read_catalog([source], encoder, 64, share=0.1)  # every sample that is gone counts, not the shard once
    catalog = read_catalog([source], encoder, 64, share=0.2)
    (summary,) = catalog.source_summaries()
    assert catalog.dropped() == {"s": {"missing_shard": 4}} and (summary.num_usable, summary.num_samples) == (16, 20)


def test_of_a_tar_with_a_link_in_it_only_that_sample_is_lost(tmp_path, encoder):
    (shard,) = write_shards(GOOD[:4], tmp_path / "s")
    data = shard.read_bytes()
    member = next(members[0] for key, members in scan_shard(shard) if key == "good002")
    link = tarfile.TarInfo("good001.0.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    at = member.offset - 512
    shard.write_bytes(data[:at] + link.tobuf() + data[at:])
    catalog = read_catalog([Source(name="s", shards=[shard])], encoder, 64, share=0.3)
    ((_, error),) = catalog.errors()
    assert (error.key, error.reason) == ("s/s-000000/good001", "bad_record")
    assert error.detail == "member 'good001.0.png' is a symbolic link; only plain files are read"
    read = row_of(catalog, RowDataset(catalog, encoder), [0, 2, 3])
    assert list(read.keys) == [f"s/s-000000/good{n:03d}" for n in (0, 2, 3)] and not read.errors


def test_a_shard_cut_after_its_index_was_built_is_noticed_at_the_next_start(found, encoder):
    shard = found.shards[1].location
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(TooManyBadSamples, match=r"s-000001\.tar is not a whole tar"):
        read_catalog(found.sources, encoder, 64, share=0.0)


def test_a_shard_cut_between_two_samples_is_noticed_by_its_manifest(found, encoder):
    shard = found.shards[1].location
    last = found.index_row(1, 2)["members"][-1]
    os.truncate(shard, -(-(last["offset"] + last["size"]) // 512) * 512)
    with pytest.raises(ValueError, match=r"s-000001\.tar holds 3 samples, shards\.json beside it says 5"):
        read_catalog(found.sources, encoder, 64)


def test_a_shard_cut_while_training_drops_what_is_behind_the_cut(found, encoder):
    shard = found.shards[1].location
    dataset = RowDataset(found, encoder)
    assert not row_of(found, dataset).errors
    image = next(member for member in found.index_row(1, 2)["members"] if member["name"] != "json")
    os.truncate(shard, image["offset"] + image["size"] // 2)  # through an image of its third sample
    row = row_of(found, dataset)
    bad = {error.key: error for _, error in row.errors}
    assert set(bad) == {f"s/s-000001/good{n:03d}" for n in (7, 8, 9)} and len(row.keys) == 17
    assert all(error.reason == "missing_shard" and "s-000001.tar" in error.detail for error in bad.values())
    assert [use.error is not None for use in row.uses] == [n in (7, 8, 9) for n in range(20)]


def test_a_jpeg_cut_behind_its_header_is_dropped_by_key(tmp_path, encoder):
    broken = jpeg()[: len(jpeg()) // 2]
    catalog = open_data(tmp_path, [*GOOD, ("torn", record(), {"0.png": broken})], encoder)
    assert not list(catalog.errors()), "its header is whole, so the index takes it"
    ((source, error),) = row_of(catalog, RowDataset(catalog, encoder), range(21)).errors
    assert (source, error.key, error.reason) == ("s", "s/s-000004/torn", "unreadable_image")
    assert "truncated" in error.detail


def test_a_member_that_is_not_there_is_dropped_by_key(tmp_path, encoder):
    two = record(images=2, shown=2)
    catalog = open_data(tmp_path, [*GOOD, ("half", two, {"0.png": png()})], encoder)
    ((number, error),) = catalog.errors()
    assert (number, error.key, error.reason) == (20, "s/s-000004/half", "missing_media") and "1.png" in error.detail
    assert sorted(key for _, rows in load(RowDataset(catalog, encoder)) for row in rows for key in row.keys) == sorted(
        2 * [f"s/s-{n // 5:06d}/{key}" for n, (key, _, _) in enumerate(GOOD)]
    )


def test_a_record_that_was_overwritten_since_is_not_needed_for_rows_and_is_an_error_for_who_reads_it(found, encoder):
    before = row_of(found, RowDataset(found, encoder))
    row, shard = found.index_row(0, 1), found.shards[0].location
    member = next(member for member in row["members"] if member["name"] == "json")
    with shard.open("r+b") as file:
        file.seek(member["offset"])
        file.write(b"x" * member["size"])
    dataset = RowDataset(found, encoder)
    after = row_of(found, dataset)
    assert not after.errors and digest(after) == digest(before)
    with pytest.raises(SampleError, match=r"s/s-000000/good001: bad_record"):
        dataset.read(1, found.layout_of(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_takes_its_samples_alone(found, encoder, workers):
    whole = list(load(RowDataset(found, encoder)))
    found.shards[2].location.unlink()
    left = list(load(RowDataset(found, encoder), workers))
    bad = errors(left)
    assert {error.key for error in bad} == {f"s/s-000002/good{n:03d}" for n in range(10, 15)} and len(bad) == 10
    assert {error.reason for error in bad} == {"missing_shard"} and "s-000002.tar" in bad[0].detail
    for (step, rows), (step_left, rows_left) in zip(whole, left, strict=True):
        assert step.number == step_left.number
        for row, row_left in zip(rows, rows_left, strict=True):
            assert [key for key in row.keys if "/s-000002/" not in key] == list(row_left.keys)
