"""Charts: points at the right pixels, ticks that enclose them, averages that neither lag nor mix stages."""

import math
from itertools import pairwise

import pytest

from eagle_train.track.charts import Line, line_chart, nice_ticks, short, smooth, thin
from eagle_train.track.curves import by_suffix, make_curves, merged, series, stage_spans

STAGES = [("sft", 0, 100)]


def chart(points, **options):
    line = Line(name="loss", stretches=[points])
    return line_chart("Loss", [line], STAGES, width=500, height=200, **options)


def pixels(path):
    return [tuple(map(float, pair.split())) for pair in path.d.removeprefix("M").split("L")]


def test_points_lie_where_the_ticks_say():
    drawn = chart([(0, 0.0), (50, 1.0), (100, 2.0)])
    (x0, y0), (x1, y1), (x2, y2) = pixels(drawn.paths[0])
    assert (x0, y0, x2, y2) == (drawn.left, drawn.bottom, drawn.right, drawn.top)
    assert (x1, y1) == ((x0 + x2) / 2, (y0 + y2) / 2)
    assert {tick.label: tick.at for tick in drawn.y_ticks} == pytest.approx(
        {"0": y0, "0.5": (y0 + y1) / 2, "1": y1, "1.5": (y1 + y2) / 2, "2": y2}, abs=0.06
    )
    assert {tick.label: tick.at for tick in drawn.x_ticks}["50"] == x1


def test_a_wide_range_is_drawn_on_a_log_scale_and_said_so():
    drawn = chart([(0, 0.01), (50, 1.0), (100, 100.0)])
    assert drawn.note == "log scale"
    (_, low), (_, middle), (_, high) = pixels(drawn.paths[0])
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert [tick.label for tick in drawn.y_ticks] == ["0.01", "0.1", "1", "10", "100"]
    assert chart([(0, 0.01), (100, 100.0)], from_zero=True).note == ""


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-9])
def test_a_constant_line_is_drawn_inside_the_plot(value):
    drawn = chart([(0, value), (100, value)])
    assert all(drawn.top <= y <= drawn.bottom for _, y in pixels(drawn.paths[0]))
    assert len(drawn.y_ticks) >= 2


def test_a_single_point_is_a_dot():
    drawn = chart([(100, 1.5)])
    assert drawn.paths[0].d == ""
    assert len(drawn.paths[0].dots) == 1


def test_no_points_make_no_chart():
    assert chart([]) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.87), (-3, 1700), (1e-9, 3e-9), (97.2, 99.9)])
def test_ticks_enclose_the_values_and_are_few(low, high):
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 3 <= len(ticks) <= 9
    steps = [b - a for a, b in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_numbers_are_short():
    values = [0, 0.1234, 7.23e-9, 999.6, 1234, 12345, 1.72e6, 3.5e9, -25000]
    assert [short(v) for v in values] == ["0", "0.123", "7.23e-09", "1000", "1234", "12.3k", "1.72M", "3.5G", "-25k"]


@pytest.mark.parametrize(
    ("value", "said"), [(999_999, "1M"), (9999.7, "10k"), (999.96e6, "1G"), (-999_999, "-1M"), (99_949, "99.9k")]
)
def test_a_number_just_below_a_letters_limit_takes_that_letter(value, said):
    assert short(value) == said


def test_ticks_that_are_close_have_labels_that_differ():
    labels = [tick.label for tick in chart([(0, 99.81), (100, 99.94)], unit="%").y_ticks]
    assert labels == ["99.8%", "99.85%", "99.9%", "99.95%"]


@pytest.mark.parametrize("value", [1.0, 99.9, 1e6])
def test_means_that_differ_in_their_last_bits_are_drawn_as_constant(value):
    drawn = chart([(0, value), (100, math.nextafter(value, math.inf))])
    assert all(drawn.top <= y <= drawn.bottom for _, y in pixels(drawn.paths[0]))
    labels = [tick.label for tick in drawn.y_ticks]
    assert len(set(labels)) == len(labels) >= 2


def test_a_line_at_zero_has_an_axis_that_is_not_below_it():
    assert next(tick.label for tick in chart([(0, 0.0), (100, 0.0)], from_zero=True).y_ticks) == "0"


@pytest.mark.parametrize("least", [1e-30, 5e-324])
def test_a_log_axis_over_many_powers_of_ten_has_few_ticks(least):
    drawn = chart([(0, least), (100, 1.0)])
    assert 4 <= len(drawn.y_ticks) <= 10
    assert all(drawn.top <= y <= drawn.bottom for _, y in pixels(drawn.paths[0]))


def test_thinning_keeps_means_and_ends_with_the_rest():
    assert thin([(1, 10.0), (2, 20.0), (3, 60.0)], 2) == [(1.5, 15.0), (3, 60.0)]


def test_a_smoothed_straight_line_stays_where_it_is_away_from_its_ends():
    points = [(step, 5.0 - 0.01 * step) for step in range(200)]
    values = [y for _, y in smooth(points, 20)]
    assert values[10:190] == pytest.approx([y for _, y in points[10:190]])


def test_smoothing_removes_noise():
    noisy = [(step, 1.0 + (-1) ** step) for step in range(100)]
    assert all(abs(y - 1.0) < 0.1 for _, y in smooth(noisy, 21))
    assert smooth(noisy, 1.0) == noisy


def two_stages():
    first = [{"step": s, "stage": "pretrain", "train/loss": 4.0, "lr/projector": 1.0} for s in range(1, 11)]
    rates = {"lr/projector": 0.5, "lr/llm": 0.5, "lr/mixture": 0.5}
    second = [{"step": s, "stage": "sft", "train/loss": 1.0, "train/loss/a": 1.0} | rates for s in range(11, 31)]
    return first + second


def test_a_stage_begins_where_the_one_before_it_ends():
    assert stage_spans(two_stages()) == [("pretrain", 0, 10), ("sft", 10, 30)]


def test_stages_are_not_smoothed_into_each_other():
    loss = make_curves(two_stages()).training[0]
    (line,) = loss.hover["lines"]
    assert line["points"] == [[s, 4.0 if s <= 10 else 1.0] for s in range(1, 31)]
    assert loss.paths[1].d.count("M") == 2
    assert [band.name for band in loss.bands] == ["pretrain", "sft"]


def test_a_value_that_was_not_finite_is_left_out():
    records = [{"step": s, "stage": "sft", "train/loss": None if s == 2 else 1.0} for s in (1, 2, 3)]
    assert series(records, "train/loss") == [[(1, 1.0), (3, 1.0)]]


def test_equal_learning_rates_are_one_line_under_all_their_names():
    lines = merged(by_suffix(two_stages(), "lr/", 1.0))
    assert [line.name for line in lines] == ["projector", "llm, mixture"]
    assert [line.style for line in lines] == ["", "dash0"]


def test_what_was_not_logged_has_no_chart():
    curves = make_curves(two_stages())
    assert [chart and chart.title for chart in curves.training] == [
        "Training loss",
        "Loss by source",
        "Learning rate",
        None,
    ]
    assert curves.throughput == [None] * 7


def test_a_long_run_is_drawn_with_few_points():
    records = [{"step": s, "stage": "sft", "train/loss": 1.0 + s % 7} for s in range(1, 20_001)]
    loss = make_curves(records).training[0]
    assert 250 <= len(pixels(loss.paths[0])) <= 500
    assert loss.hover["x1"] == 20_000
