"""The benchmark of training steps runs at toy size, and its numbers hang together."""

import json
from pathlib import Path

import pytest

from tests.runs import run_script

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "train_step.py"


def result_of(*arguments):
    """Returns the last line of the script, JSON, and all it printed."""
    printed = run_script(SCRIPT, *arguments, CUDA_VISIBLE_DEVICES="")
    return json.loads(printed.splitlines()[-1]), printed


@pytest.mark.slow
def test_ours_the_bare_loop_and_padded_trainers_run_on_the_same_samples():
    found, printed = result_of("--samples", "4", "--row", "1024", "--repeats", "1", "--batch", "2")
    assert set(found["seconds"]) == {"ours", "bare", "overhead", "transformers", "llava"}
    assert min(found["seconds"][name] for name in ("ours", "bare", "transformers", "llava")) > 0
    for name, ratio in found["ratios"].items():
        assert ratio == pytest.approx(found["seconds"][name] / found["seconds"]["ours"])
    assert found["supervised"] < found["tokens"] and found["commit"] and found["hardware"]
    assert "overhead of the trainer over the bare loop" in printed


@pytest.mark.slow
def test_the_sweep_says_what_it_measured_and_what_it_skipped():
    sizes = ("--sizes", "toy", "--lengths", "512", "1024", "--peak-tflops", "0.1")
    found, printed = result_of("--sweep", *sizes, "--attention", "segments", "nonesuch")
    measured = [case for case in found["cases"] if "skipped" not in case]
    assert {case["row"] for case in measured} == {512, 1024} and len(measured) == len(found["cases"]) / 2
    assert all(0 < case["mfu"] < case["hfu"] and case["tokens_per_second"] > 0 for case in measured)
    assert {case["attention"] for case in found["cases"] if "skipped" in case} == {"nonesuch"}
    assert "2 FLOPs per multiply-add" in printed
