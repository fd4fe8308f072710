"""Ten random disturbances of toy runs, see `scripts/chaos.py`; its long mode has 200."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import environment

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_disturbed_runs_are_what_undisturbed_ones_are(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--disturbances", "10", "--max-ranks", "2"]
    done = subprocess.run(
        [*script, "--keep", str(tmp_path)], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert sum(result["disturbances"].values()) == 10 and result["runs"] >= 1
