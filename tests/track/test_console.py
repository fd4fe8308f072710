"""Progress: a bar on a terminal, sparse plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from eagle_train.track.console import ConsoleTracker, progress

RECORD = {
    "stage": "sft",
    "train/loss": 1.23456,
    "lr/llm": 1e-4,
    "lr/projector": 2e-4,
    "time/tokens_per_second": 12345.6,
    "time/data_wait_share": 0.034,
    "time/eta_seconds": 3725.2,
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def make_console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def lines_of(console):
    return console.file.getvalue().splitlines()


def test_a_line_says_what_is_worth_watching(clock):
    console = make_console(False)
    tracker = ConsoleTracker(console, clock=clock)
    tracker.begin_stage("sft", 6, 10)
    tracker.log(RECORD | {"stage_step": 7}, 107)
    assert lines_of(console) == [
        "sft 7/10 (step 107)  loss 1.2346  lr 2.00e-04  12,346 tok/s  wait 3%  eta 1:02:05",
    ]


def test_without_a_terminal_lines_are_sparse_but_the_first_and_last_of_a_stage_are_there(clock):
    console = make_console(False)
    tracker = ConsoleTracker(console, every_seconds=10.0, clock=clock)
    for stage, num_steps in (("pretrain", 25), ("sft", 12)):
        tracker.begin_stage(stage, 0, num_steps)
        for step in range(1, num_steps + 1):
            clock.now += 1.0
            tracker.log({"train/loss": 1.0, "stage_step": step}, step)
    tracker.close()
    told = [line.split(" (")[0] for line in lines_of(console)]
    assert told == [
        "pretrain 1/25",
        "pretrain 11/25",
        "pretrain 21/25",
        "pretrain 25/25",
        "sft 1/12",
        "sft 11/12",
        "sft 12/12",
    ]


def test_on_a_terminal_a_bar_is_up_only_while_its_stage_runs():
    console = make_console(True)
    tracker = ConsoleTracker(console)
    for stage in ("pretrain", "sft"):
        tracker.begin_stage(stage, 0, 2)
        for step in (1, 2):
            tracker.log(RECORD | {"stage_step": step}, step)
        written = len(console.file.getvalue())
        console.print("between stages")
        assert len(console.file.getvalue()) - written < 40  # no bar is redrawn around it
    tracker.close()
    shown = console.file.getvalue()
    assert "2/2" in shown and "loss 1.2346" in shown and "pretrain" in shown and "sft" in shown


def test_scores_are_shown_as_a_table_of_model_grey_and_chance():
    console = make_console(False)
    scores = {"eval/exact_match/count": 0.9, "eval/exact_match/half": 0.5, "eval_grey/exact_match/count": 0.25}
    ConsoleTracker(console).log(scores, 10)
    rows = [line for line in lines_of(console) if "%" in line]
    assert len(rows) == 2
    assert "count" in rows[0] and "90.0%" in rows[0] and "25.0%" in rows[0]
    assert "half" in rows[1] and "50.0%" in rows[1]


def test_progress_without_a_terminal_says_how_far_it_is_and_how_long_it_takes(clock):
    console = make_console(False)
    with progress("reading", 40, console=console, every_seconds=10.0, clock=clock) as advance:
        for _ in range(20):
            clock.now += 1.5
            advance(2)
    assert lines_of(console) == [
        "reading: 14/40 in 10.5 s, 0:00:20 left",
        "reading: 28/40 in 21.0 s, 0:00:09 left",
        "reading: 40/40 in 30.0 s",
    ]


def test_progress_without_a_terminal_says_the_end_once(clock):
    console = make_console(False)
    with progress("reading", 3, console=console, every_seconds=10.0, clock=clock) as advance:
        clock.now += 12.0
        advance(3)
        clock.now += 1.0
    assert lines_of(console) == ["reading: 3/3 in 12.0 s"]
    with progress("reading", 0, console=console, clock=clock):
        pass
    assert lines_of(console)[-1] == "reading: 0/0 in 0.0 s"


def test_progress_of_an_unknown_number_of_items_counts_them(clock):
    console = make_console(False)
    with progress("writing", None, console=console, clock=clock) as advance:
        advance(7)
    assert lines_of(console) == ["writing: 7 in 0.0 s"]


def test_progress_on_a_terminal_is_a_bar():
    console = make_console(True)
    with progress("reading", 3, console=console) as advance:
        for _ in range(3):
            advance(1)
    assert "3/3" in console.file.getvalue()


def test_only_rank_0_shows_progress(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    console = make_console(False)
    with progress("reading", 3, console=console) as advance:
        advance(3)
    assert lines_of(console) == []
