"""Ten random disturbances of toy runs, see `scripts/chaos.py`; its long mode has 200."""

import json
from pathlib import Path

import pytest

from tests.runs import run_script

SCRIPT = Path(__file__).parents[1] / "scripts" / "chaos.py"

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_disturbed_runs_are_what_undisturbed_ones_are(tmp_path):
    asked = ("--disturbances", "10", "--max-ranks", "2", "--keep", str(tmp_path))
    result = json.loads(run_script(SCRIPT, *asked, timeout=900).splitlines()[-1])
    assert sum(result["disturbances"].values()) == 10 and result["runs"] >= 1
