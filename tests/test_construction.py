"""Under ZeRO-3 a model is never whole on a rank, neither at its start nor between two stages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import environment

SCRIPT = Path(__file__).parents[1] / "scripts/bench/construction.py"

pytestmark = pytest.mark.slow


def test_two_ranks_hold_little_more_than_half_a_model_each():
    command = [sys.executable, str(SCRIPT), "--layers", "10"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    mib = json.loads(done.stdout.splitlines()[-1])["mib"]
    assert mib["whole model"] > 400
    for name in ("random", "file"):
        assert 0.2 < mib[f"{name}: shards"] / mib["whole model"] < 0.65
        assert mib[f"{name}: peak of construction"] / mib["whole model"] < 0.7
    assert mib["peak of two stages"] / mib["whole model"] < 0.25
