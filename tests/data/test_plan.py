"""The plan: a pure function, every sample exactly as often as its repeat says, the same on any cluster."""

from pathlib import Path

import numpy as np
import pytest

from eagle_train.data.catalog import Catalog, Source
from eagle_train.data.plan import PlanConfig, fingerprint, plan_epoch, plan_rows, shuffled, splitmix64, step_rows


def catalog(sizes=(300, 120), shard_size=50, repeats=(1.0, 1.0), bad=()):
    """Sources of random lengths in shards of `shard_size`."""
    rng = np.random.default_rng(1)
    sources, source_ids, shard_ids, shards = [], [], [], []
    for i, (size, repeat) in enumerate(zip(sizes, repeats, strict=True)):
        here = [Path(f"s{i}-{k}.tar") for k in range(-(-size // shard_size))]
        source_ids += [i] * size
        shard_ids += [len(shards) + row // shard_size for row in range(size)]
        shards += here
        sources.append(Source(name=f"s{i}", shards=here, repeat=repeat))
    n = sum(sizes)
    lengths = rng.integers(20, 300, size=n).astype(np.int32)
    lengths[list(bad)] = 0
    return Catalog(
        sources=sources,
        shards=shards,
        source_ids=np.array(source_ids, dtype=np.int32),
        shard_ids=np.array(shard_ids, dtype=np.int32),
        rows=np.arange(n, dtype=np.int32),
        lengths=lengths,
        num_tiles=np.zeros(n, dtype=np.int32),
        errors={},
        cuts={},
        fingerprint="x",
        tables=[],
    )


PINNED = [637557492691185812, 4224912144409887360, 10434316095484257304]
SMALL = PlanConfig(max_length=512, window_samples=100)


@pytest.mark.parametrize("window", [1, 100, 10_000])
def test_an_epoch_holds_every_good_sample_once(window):
    data = catalog(bad=(3, 77))
    rows = plan_rows(data, PlanConfig(max_length=512, window_samples=window), num_epochs=1, num_rows=None)
    assert sorted(rows.samples.tolist()) == sorted(set(range(420)) - {3, 77})
    assert max(data.lengths[rows[i]].sum() for i in range(len(rows))) <= 512


def test_repeats_are_exact_and_a_fraction_is_a_seeded_subset():
    data = catalog(repeats=(2.0, 0.5))
    epochs = [np.concatenate([r for w in plan_epoch(data, SMALL, e) for r in w]) for e in (0, 1)]
    for samples in epochs:
        counts = np.bincount(samples, minlength=420)
        assert (counts[:300] == 2).all()
        assert counts[300:].sum() == 60 and counts[300:].max() == 1
    assert set(epochs[0].tolist()) != set(epochs[1].tolist()), "another half in another epoch"


def test_the_plan_is_a_pure_function_of_seed_and_data():
    one = plan_rows(catalog(), SMALL, num_epochs=2, num_rows=None)
    two = plan_rows(catalog(), SMALL, num_epochs=2, num_rows=None)
    other = plan_rows(catalog(), PlanConfig(max_length=512, window_samples=100, seed=1), num_epochs=2, num_rows=None)
    assert np.array_equal(one.samples, two.samples) and np.array_equal(one.offsets, two.offsets)
    assert not np.array_equal(one.samples, other.samples)


def test_epochs_differ_and_fewer_rows_are_a_prefix_of_more():
    rows = plan_rows(catalog(), SMALL, num_epochs=None, num_rows=400)
    some = plan_rows(catalog(), SMALL, num_epochs=None, num_rows=37)
    assert len(rows) == 400 and len(some) == 37
    assert all(np.array_equal(rows[i], some[i]) for i in range(37))
    first, second = (list(plan_epoch(catalog(), SMALL, e)) for e in (0, 1))
    assert not np.array_equal(first[0][0], second[0][0])


def test_windows_fill_rows_by_carrying_what_is_left():
    data = catalog(sizes=(3000,), repeats=(1.0,))
    rows = plan_rows(data, SMALL, num_epochs=1, num_rows=None)
    assert data.lengths.sum() / (len(rows) * 512) > 0.97


def test_a_catalog_without_usable_samples_is_refused():
    with pytest.raises(ValueError, match="no usable sample"):
        plan_rows(catalog(sizes=(2,), repeats=(1.0,), bad=(0, 1)), SMALL, num_epochs=1, num_rows=None)


@pytest.mark.parametrize("world_size", range(1, 8))
@pytest.mark.parametrize("rows_per_step", [1, 4, 6])
def test_ranks_share_the_rows_of_a_step_whatever_their_number(world_size, rows_per_step):
    num_rows = 23
    for step in range(-(-num_rows // rows_per_step)):
        shares = [step_rows(step, rows_per_step, num_rows, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1, "every rank runs as many micro-batches"
        real = sorted(row for share in shares for row in share if row >= 0)
        first = step * rows_per_step
        assert real == list(range(first, min(first + rows_per_step, num_rows)))


def test_the_shuffle_is_fixed_for_ever():
    # Published SplitMix64 is used per key; these values pin our chaining of keys.
    assert splitmix64(np.arange(3), 1, 2, 3).tolist() == PINNED
    assert sorted(shuffled(np.arange(50), 1, 2, 3, 0).tolist()) == list(range(50))
    assert shuffled(np.arange(50), 1, 2, 3, 0).tolist() != shuffled(np.arange(50), 1, 2, 4, 0).tolist()


def test_a_fingerprint_names_the_part_that_differs():
    one, two = fingerprint({"data": "a", "plan": [1, 2]}), fingerprint({"data": "a", "plan": [1, 3]})
    assert one["data"] == two["data"] and one["plan"] != two["plan"]


def test_an_epoch_without_samples_is_refused_instead_of_planned_for_ever():
    with pytest.raises(ValueError, match="holds no sample: the sources' repeats are"):
        plan_rows(catalog(sizes=(20,), repeats=(0.0,)), SMALL, num_epochs=None, num_rows=5)


def test_samples_that_cannot_share_rows_are_not_carried_through_the_epoch():
    data = catalog(sizes=(2000,), repeats=(1.0,))
    data.lengths[:] = 300
    windows = list(plan_epoch(data, SMALL, 0))
    assert max(len(window) for window in windows) <= 3 * SMALL.window_samples
    assert sorted(np.concatenate([row for window in windows for row in window]).tolist()) == list(range(2000))
