"""The benchmark of buckets runs at toy size on two ranks, and its numbers hang together."""

import json
from pathlib import Path

import pytest

from tests.runs import run_script

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "buckets.py"


@pytest.mark.slow
def test_every_case_is_measured_beside_deepspeeds_own_defaults():
    one_of_each = ("--samples", "12", "--steps", "1", "--repeats", "1", "--buckets", "5000", "--stages", "3")
    printed = run_script(SCRIPT, "--ranks", "2", "--row", "512", *one_of_each, CUDA_VISIBLE_DEVICES="").splitlines()
    found = json.loads(printed[-1])
    assert found["ranks"] == 2 and found["commit"] and found["command"]
    assert list(found["seconds"]["zero3"]) == ["deepspeed", "ours", "ours, overlap", "buckets 5,000"]
    assert found["deepspeed"]["zero3"]["reduce_bucket_size"] == 500_000_000  # what it is on its own
    assert all(seconds > 0 for seconds in found["seconds"]["zero3"].values())
    assert sum("of DeepSpeed's defaults" in line for line in printed) == 4
