"""The plan: a pure function, every sample exactly as often as its repeat says, the same on any cluster."""

import hashlib
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest

from eagle_train.data.balance import CostModel
from eagle_train.data.index import index_stem
from eagle_train.data.layout import layout_path
from eagle_train.data.mixing import Piece, asked_shares, epoch_pieces, piece_rows, repeats
from eagle_train.data.plan import PLAN_VERSION, count_rows, epoch_windows, plan_window
from eagle_train.data.shuffle import splitmix64
from eagle_train.data.stream import Cursor, count_steps, find_row, steps
from tests.catalogs import made_up_catalog, plan_config

PINNED_PLAN = (2, "aa425d931d2c7825", 73)


def rows_of(steps_made):
    """The rows of steps, as lists of sample numbers."""
    return [row.tolist() for step in steps_made for row in step.rows]


def samples_of(steps_made):
    return [number for row in rows_of(steps_made) for number in row]


@pytest.mark.parametrize("window_rows", [1, 20, 10_000])
def test_an_epoch_holds_every_good_sample_once(tmp_path, window_rows):
    catalog = made_up_catalog(tmp_path, bad=(3, 77))
    made = list(steps(catalog, plan_config(catalog, window_rows=window_rows)))
    assert sorted(samples_of(made)) == sorted(set(range(420)) - {3, 77})
    lengths = np.concatenate([catalog.sizes(shard).num_tokens for shard in range(len(catalog.shards))])
    assert max(lengths[row].sum() for row in rows_of(made)) <= 512
    assert sum(step.num_tokens for step in made) == lengths.sum()
    assert sum(step.read for step in made).tolist() == [298, 120]


def test_repeats_are_exact_and_what_a_fraction_leaves_over_comes_later(tmp_path):
    catalog = made_up_catalog(tmp_path, repeats=(2.0, 0.4))
    config = plan_config(catalog, num_epochs=None)
    epochs = []
    for epoch in range(5):
        windows = epoch_windows(catalog, config, epoch)
        made = [plan_window(catalog, config, pieces, epoch, n).samples for n, pieces in enumerate(windows)]
        epochs.append(np.bincount(np.concatenate(made), minlength=420))
    assert all((counts[:300] == 2).all() for counts in epochs)
    assert [counts[300:].sum() for counts in epochs] == [48] * 5
    assert (sum(epochs)[300:] == 2).all(), "two fifths in each of five epochs are two passes"
    assert not (epochs[0][300:] & epochs[1][300:]).any(), "no sample again before all have come"


@pytest.mark.parametrize("repeat", ["0.013", "0.5", "1.7", "3"])
def test_a_fraction_is_exact_in_every_epoch_and_over_all_of_them(tmp_path, repeat):
    catalog = made_up_catalog(tmp_path, sizes=(97, 33), shard_size=7)
    parts, total = (Fraction(repeat), Fraction(1)), 0
    for epoch in range(9):
        taken = sum(piece.count for piece in epoch_pieces(catalog, parts, epoch) if piece.shard < 14)
        total += taken
        assert total == int((epoch + 1) * Fraction(repeat) * 97)


def test_passes_over_a_shard_have_orders_of_their_own(tmp_path):
    catalog = made_up_catalog(tmp_path, repeats=(0.5, 0.5))
    halves = [epoch_pieces(catalog, (Fraction(1, 2), Fraction(0)), epoch)[0] for epoch in range(4)]
    rows = [set(piece_rows(piece, 50, 0).tolist()) for piece in halves]
    assert rows[0] | rows[1] == rows[2] | rows[3] == set(range(50)) and len(rows[0]) == 25
    assert rows[0] != rows[2], "the second pass is cut elsewhere"


def test_equal_arguments_give_equal_rows_and_another_seed_gives_others(tmp_path):
    catalog = made_up_catalog(tmp_path)
    config = plan_config(catalog, num_epochs=2)
    one, two = rows_of(steps(catalog, config)), rows_of(steps(pickle.loads(pickle.dumps(catalog)), config))
    assert one == two
    assert one != rows_of(steps(catalog, plan_config(catalog, num_epochs=2, seed=1)))
    assert one[: len(one) // 2] != one[len(one) // 2 :], "another order in another epoch"


def test_the_plan_is_fixed_for_ever(tmp_path):
    # A run goes on with the rows of its plan: whoever makes others raises PLAN_VERSION, and pins them here.
    lengths = 20 + (splitmix64(np.arange(420)) % np.uint64(280)).astype(np.int64)
    catalog = made_up_catalog(tmp_path, repeats=(1.0, 0.7), bad=(3, 77), lengths=lengths)
    cost = CostModel(per_token=1e3, per_token_squared=2.0, per_tile=3e4, per_tile_pair=2e4)
    made = list(steps(catalog, plan_config(catalog, num_epochs=3, rows_per_step=5, seed=7, cost=cost)))
    pin = hashlib.sha256(json.dumps(rows_of(made)).encode()).hexdigest()[:16]
    assert (PLAN_VERSION, pin, len(made)) == PINNED_PLAN


def test_fewer_steps_are_the_first_of_more_and_run_through_epochs(tmp_path):
    catalog = made_up_catalog(tmp_path)
    config = plan_config(catalog, num_epochs=None)
    many, some = list(steps(catalog, config, end=100)), list(steps(catalog, config, end=37))
    assert len(many) == 100 and rows_of(many)[: 37 * 4] == rows_of(some)
    assert all(len(step.rows) == 4 for step in many)
    assert len(samples_of(many)) > 2 * 420, "more than two epochs"


def test_any_step_follows_from_its_cursor_alone(tmp_path):
    catalog = made_up_catalog(tmp_path)
    config = plan_config(catalog, num_epochs=3, rows_per_step=5)
    whole = list(steps(catalog, config))
    for done in range(1, len(whole)):
        cursor = whole[done - 1].after
        step = next(steps(catalog, config, first=done, cursor=cursor))
        assert step.number == done and rows_of([step]) == rows_of([whole[done]])
        assert step.after == whole[done].after, "so that the rest follows too"
        assert cursor.epoch > 0 or cursor.window > 0 or done * 5 <= 100
    half = len(whole) // 2
    rest = steps(catalog, config, first=half, cursor=whole[half - 1].after)
    assert rows_of(rest) == rows_of(whole[half:])
    assert rows_of(steps(catalog, config, first=7)) == rows_of(whole[7:]), "without a cursor, from the beginning"


def test_a_window_of_short_samples_closes_at_a_number_of_them(tmp_path, monkeypatch):
    catalog = made_up_catalog(tmp_path)
    monkeypatch.setattr("eagle_train.data.plan.MAX_WINDOW_SAMPLES", 100)
    windows = epoch_windows(catalog, plan_config(catalog, window_rows=10**6), 0)
    counts = [[piece.count for piece in window] for window in windows]
    assert sum(map(sum, counts)) == 420 and len(counts) > 3
    assert all(sum(window[:-1]) < 100 <= sum(window) for window in counts[:-1])


def test_a_window_without_a_good_sample_has_no_row(tmp_path):
    catalog = made_up_catalog(tmp_path, bad=range(50))
    window = plan_window(catalog, plan_config(catalog), [Piece(0, 0, 50)], 0, 0)
    assert len(window) == 0 and window.offsets.tolist() == [0]
    columns = (window.samples, window.num_tokens, window.num_tiles, window.costs)
    assert all(column.shape == (0,) and column.dtype == np.int64 for column in columns)
    both = plan_window(catalog, plan_config(catalog), [Piece(0, 0, 50), Piece(1, 0, 50)], 0, 0)
    assert sorted(both.samples.tolist()) == list(range(50, 100))


def test_the_window_of_a_row_is_found(tmp_path):
    catalog = made_up_catalog(tmp_path)
    config = plan_config(catalog, num_epochs=2)
    whole = list(steps(catalog, config))
    firsts = sorted({step.after.first_row for step in whole})
    assert len(firsts) > 3
    for row in (0, firsts[1] - 1, firsts[1], firsts[-1], 10**6):
        passed = []
        cursor = find_row(catalog, config, row, passed.append)
        assert cursor.first_row == max(first for first in firsts if first <= row)
        assert sum(passed) == min(row, sum(len(step.rows) for step in whole)), "as many as were asked for, if there are"
    across = next(step for step in whole if step.first_row < step.after.first_row)
    assert find_row(catalog, config, across.first_row + 3) == across.after, "a step stands where its last row does"
    number = firsts[2] // config.rows_per_step
    cursor = find_row(catalog, config, number * config.rows_per_step)
    assert rows_of(steps(catalog, config, first=number, cursor=cursor)) == rows_of(whole[number:])


def test_a_cursor_makes_no_earlier_window(tmp_path):
    catalog = made_up_catalog(tmp_path)
    config = plan_config(catalog, num_epochs=2)
    whole = list(steps(catalog, config))
    late = next(n for n, step in enumerate(whole) if step.after.epoch == 1 and step.after.window == 2)
    wanted = {piece.shard for window in epoch_windows(catalog, config, 1)[2:] for piece in window}
    assert len(wanted) < len(catalog.shards)
    for shard in set(range(len(catalog.shards))) - wanted:
        layout_path(index_stem(catalog.shards[shard].location, None), "x").unlink()
    assert next(steps(catalog.apart(), config, first=late + 1, cursor=whole[late].after)).number == late + 1


def test_totals_are_those_of_the_rows(tmp_path):
    catalog = made_up_catalog(tmp_path, bad=(9,))
    config = plan_config(catalog, num_epochs=2)
    made = list(steps(catalog, config))
    totals = count_rows(catalog, config)
    assert totals == count_steps(catalog, config, 10_000)
    assert count_steps(catalog, config, 3).samples == len(samples_of(made[:3]))
    assert (totals.rows, totals.samples) == (len(rows_of(made)), len(samples_of(made)))
    assert totals.tiles == 2 * (140 - 1)


def test_a_row_costs_what_its_samples_cost(tmp_path):
    cost = CostModel(per_token=1e3, per_token_squared=1e2, per_target=7e4, per_tile=9e5)
    catalog = made_up_catalog(tmp_path, bad=(9,))
    sizes = [catalog.sizes(shard) for shard in range(len(catalog.shards))]
    lengths, tiles, targets = (
        np.concatenate([getattr(of, name) for of in sizes]) for name in ("num_tokens", "num_tiles", "num_targets")
    )
    expected = cost.sample_costs(lengths, tiles, num_targets=targets)
    for step in steps(catalog, plan_config(catalog, cost=cost)):
        assert step.costs.tolist() == [expected[row].sum() for row in step.rows]


def test_only_the_last_step_of_a_stage_is_short(tmp_path):
    catalog = made_up_catalog(tmp_path)
    made = list(steps(catalog, plan_config(catalog, num_epochs=2, rows_per_step=7)))
    assert {len(step.rows) for step in made[:-1]} == {7} and 0 < len(made[-1].rows) <= 7
    assert [step.first_row for step in made] == [7 * n for n in range(len(made))]
    assert made[-1].after != Cursor()


def test_weights_give_the_asked_shares_in_what_they_count(tmp_path):
    lengths = np.concatenate([np.full(300, 40), np.full(120, 200)])
    catalog = made_up_catalog(tmp_path, weights=(1.0, 3.0), lengths=lengths)
    sums = catalog.source_summaries()
    for measure, size in (("samples", np.ones(420)), ("tokens", lengths), ("supervised_tokens", lengths // 2)):
        passes = repeats(catalog.sources, sums, measure)
        assert asked_shares(passes, sums, measure) == pytest.approx([0.25, 0.75], abs=1e-5)
        numbers = np.array(samples_of(steps(catalog, plan_config(catalog, repeats=tuple(passes), num_epochs=4))))
        share = size[numbers[numbers < 300]].sum() / size[numbers].sum()
        assert share == pytest.approx(0.25, abs=0.01), measure
        assert size[numbers].sum() == pytest.approx(4 * size.sum(), rel=0.02), (
            "an epoch is as long as one pass over all"
        )


def test_a_source_that_weighs_nothing_gives_nothing_even_where_it_has_nothing(tmp_path):
    catalog = made_up_catalog(tmp_path, weights=(2.0, 0.0), bad=range(300, 420))
    assert repeats(catalog.sources, catalog.source_summaries(), "samples") == [1, 0]
    catalog = made_up_catalog(tmp_path, repeats=(0.5, 0.0))
    assert repeats(catalog.sources, catalog.source_summaries(), "samples") == [Fraction(1, 2), 0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": (1.0, None)}, r"\['s0'\] have weights and \['s1'\] do not"),
        ({"weights": (0.0, 0.0)}, "all weights are 0"),
        ({"weights": (-1.0, 2.0)}, "negative"),
        ({"repeats": (1.0, -0.5)}, "negative"),
        ({"weights": (1.0, 1.0), "bad": range(300, 420)}, r"\['s1'\] have a weight but no usable sample"),
    ],
)
def test_weights_that_mean_nothing_are_refused(tmp_path, changes, said):
    catalog = made_up_catalog(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        repeats(catalog.sources, catalog.source_summaries(), "samples")


def test_an_unknown_measure_is_refused(tmp_path):
    catalog = made_up_catalog(tmp_path)
    with pytest.raises(ValueError, match="known are samples, tokens, supervised_tokens"):
        repeats(catalog.sources, catalog.source_summaries(), "pixels")


@pytest.mark.parametrize("changes", [{"bad": range(420)}, {"repeats": (0.0, 0.0)}])
def test_nothing_to_take_is_refused_instead_of_planned_for_ever(tmp_path, changes):
    catalog = made_up_catalog(tmp_path, **changes)
    with pytest.raises(ValueError, match="there is no sample to take"):
        next(steps(catalog, plan_config(catalog, num_epochs=None)))


def test_samples_that_cannot_share_rows_are_planned_as_they_are(tmp_path):
    catalog = made_up_catalog(tmp_path, lengths=np.full(420, 300))
    made = list(steps(catalog, plan_config(catalog)))
    assert sorted(samples_of(made)) == list(range(420)) and {len(row) for row in rows_of(made)} == {1}
