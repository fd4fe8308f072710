"""Under ZeRO-3 a model is never whole on a rank, neither at its start nor between two stages."""

import json
from pathlib import Path

import pytest

from tests.runs import run_script

SCRIPT = Path(__file__).parents[1] / "scripts/bench/construction.py"

pytestmark = pytest.mark.slow


def test_two_ranks_hold_little_more_than_half_a_model_each():
    mib = json.loads(run_script(SCRIPT, "--layers", "10").splitlines()[-1])["mib"]
    assert mib["whole model"] > 400
    for name in ("random", "file"):
        assert 0.2 < mib[f"{name}: shards"] / mib["whole model"] < 0.65
        assert mib[f"{name}: peak of construction"] / mib["whole model"] < 0.7
    assert mib["peak of two stages"] / mib["whole model"] < 0.25
