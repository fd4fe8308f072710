"""The benchmark of buckets runs at toy size on two ranks, and its numbers hang together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import environment

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "buckets.py"


@pytest.mark.slow
def test_every_case_is_measured_beside_deepspeeds_own_defaults():
    small = [
        "--ranks",
        "2",
        "--row",
        "512",
        "--samples",
        "12",
        "--steps",
        "1",
        "--repeats",
        "1",
        "--buckets",
        "5000",
        "--stages",
        "3",
    ]
    command, env = [sys.executable, str(SCRIPT), *small], environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=env, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.decode().splitlines()
    found = json.loads(printed[-1])
    assert found["ranks"] == 2 and found["commit"] and found["command"]
    assert list(found["seconds"]["zero3"]) == ["deepspeed", "ours", "ours, overlap", "buckets 5,000"]
    assert found["deepspeed"]["zero3"]["reduce_bucket_size"] == 500_000_000  # what it is on its own
    assert all(seconds > 0 for seconds in found["seconds"]["zero3"].values())
    assert sum("of DeepSpeed's defaults" in line for line in printed) == 4
