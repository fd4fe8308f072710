"""`python -m eagle_train report RUN [--out FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle_train.track.report import write_report


def main(argv: list[str]) -> int:
    """Writes the report of a run and prints its path; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train report",
        description="Writes one self-contained HTML file about a run, finished or not.",
    )
    parser.add_argument("run", type=Path, help="run folder, for example runs/toy")
    parser.add_argument("--out", type=Path, help="default: RUN/report.html")
    options = parser.parse_args(argv)
    print(write_report(options.run, options.out))
    return 0
