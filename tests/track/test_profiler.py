"""A window of steps is profiled: a trace, a table, and nothing outside the window."""

import gzip
import json

import pytest
import torch

from eagle_train.track.profiler import Profiler


def run(profiler, steps):
    weight = torch.ones(8, 8)
    for step in range(steps):
        profiler.at(step)
        with torch.profiler.record_function(f"step {step + 1}"):
            weight @ weight
        profiler.done(step + 1)
    profiler.close()


def names_of(path):
    """Names of the events of a trace."""
    return {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


@pytest.mark.filterwarnings("ignore")  # of a machine without a GPU, by the profiler
def test_the_trace_holds_the_steps_of_the_window_and_no_others(tmp_path):
    run(Profiler(tmp_path, start_step=2, num_steps=2), steps=6)
    names = names_of(tmp_path / "profile/steps-3-4-rank-00000.trace.json.gz")
    assert {"step 3", "step 4", "aten::mm"} <= names and not {"step 2", "step 5"} & names
    assert "aten::mm" in (tmp_path / "profile/steps-3-4-rank-00000.operations.txt").read_text()


@pytest.mark.filterwarnings("ignore")
def test_what_follows_the_last_step_of_a_window_is_not_in_it(tmp_path):
    """The save of that step, the next stage, or the evaluation of the run."""
    profiler = Profiler(tmp_path, start_step=0, num_steps=1)
    profiler.at(0)
    profiler.done(1)
    with torch.profiler.record_function("evaluation"):
        torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.close()
    assert "evaluation" not in names_of(tmp_path / "profile/steps-1-1-rank-00000.trace.json.gz")


@pytest.mark.filterwarnings("ignore")
def test_a_window_that_the_run_came_back_from_begins_anew(tmp_path):
    profiler = Profiler(tmp_path, start_step=1, num_steps=2)
    profiler.at(1)
    for step in (0, 1, 2):  # after a return to the checkpoint of step 0
        profiler.at(step)
        with torch.profiler.record_function(f"again {step + 1}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.done(step + 1)
    assert profiler.running is None
    names = names_of(tmp_path / "profile/steps-2-3-rank-00000.trace.json.gz")
    assert {"again 2", "again 3"} <= names and "again 1" not in names


@pytest.mark.filterwarnings("ignore")
def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    run(Profiler(tmp_path, start_step=0, num_steps=1), steps=1)
    assert "the profile cannot be written" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_ends_in_the_window_writes_what_there_is(tmp_path):
    run(Profiler(tmp_path, start_step=1, num_steps=100), steps=3)
    assert len(list((tmp_path / "profile").iterdir())) == 2


def test_other_ranks_and_runs_that_begin_later_profile_nothing(tmp_path):
    run(Profiler(tmp_path, start_step=0, ranks=[1]), steps=3)
    later = Profiler(tmp_path, start_step=1)
    later.at(5)
    later.close()
    assert not (tmp_path / "profile").exists()


def test_windows_that_are_empty_or_need_a_gpu_are_refused(tmp_path):
    with pytest.raises(ValueError, match="start_step 3 and num_steps 0"):
        Profiler(tmp_path, start_step=3, num_steps=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="memory records what CUDA's allocator does, and there is no GPU"):
            Profiler(tmp_path, start_step=3, memory=True)
