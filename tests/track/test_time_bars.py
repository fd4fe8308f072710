"""The report shows where the time of a run went, and what its MFU counts."""

import json
from importlib import resources

import pytest

from eagle_train.track.report import facts, write_report
from eagle_train.track.run_folder import read_run
from eagle_train.track.time_bars import MAX_STARTS, time_bars
from eagle_train.track.timeline import PHASES, Timeline

LINES = [
    {"start": 1000.0},
    {"step": 0, "seconds": {"startup": 20.0}},
    {"resumed": 0},
    {"step": 4, "seconds": {"training": 40.0, "data_wait": 4.0}, "saved": True},
    {"step": 6, "seconds": {"training": 20.0, "checkpoint": 6.0}},
    {"start": 1100.0},
    {"step": 4, "seconds": {"startup": 10.0}},
    {"resumed": 4},
    {"step": 8, "seconds": {"training": 80.0, "data_wait": 10.0}},
]
"""A run of 200 s: killed after 90 s, down for 10 s."""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    speed = {"device": "NVIDIA H200", "peak_tflops": 989.4, "ranks": 1, "convention": "Each product once.", "flops": {}}
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    record = {"step": 8, "time": 1.0, "stage": "sft", "train/loss": 1.0, "perf/mfu": 0.5, "perf/hfu": 0.6}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def test_every_start_has_a_bar_and_all_have_one_together(run):
    bars = time_bars(read_run(run).timeline)
    assert [(bar.name, bar.duration) for bar in bars.bars] == [
        ("all starts", "0:03:20"),
        ("start 1", "0:01:40"),
        ("start 2", "0:01:40"),
    ]
    assert [sum(piece.percent for piece in bar.pieces) for bar in bars.bars] == [100.0, 50.0, 50.0]
    shares = {share.phase: share.share for share in bars.shares}
    assert shares == {
        "training": 0.6,
        "startup": 0.15,
        "data_wait": 0.07,
        "checkpoint": 0.03,
        "lost": 0.1,
        "down": 0.05,
    }


def test_a_run_that_told_nothing_has_no_bars_and_many_starts_are_cut():
    assert time_bars(Timeline()) is None
    timeline = Timeline()
    for start in range(MAX_STARTS + 5):
        timeline.add({"start": 10.0 * start})
        timeline.add({"step": 0, "seconds": {"startup": 5.0}})
    bars = time_bars(timeline).bars
    assert len(bars) == 1 + MAX_STARTS and bars[-1].name == f"start {MAX_STARTS + 5}"


def test_the_report_holds_bars_and_facts_and_the_convention_of_the_mfu(run):
    shown = {fact.label: (fact.value, fact.note) for fact in facts(read_run(run))}
    assert shown["MFU"] == ("50.0%", "median; NVIDIA H200, peak 989.4 TFLOP/s")
    assert shown["Goodput"] == ("60.0%", "of 0:03:20 over all starts")
    page = write_report(run).read_text()
    assert "Peak of NVIDIA H200: 989.4 TFLOP/s. Each product once." in page
    assert 'class="t-lost" style="width:10.0%" title="steps done again: 20.0 s"' in page
    assert "down between starts 5.0% (10.0 s)" in page and "Use of the devices&#39; peak" in page


def test_every_phase_has_a_colour():
    style = resources.files("eagle_train.track").joinpath("report.css").read_text()
    assert all(f".t-{phase} " in style for phase in PHASES)
