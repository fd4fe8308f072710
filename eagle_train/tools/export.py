"""`python -m eagle_train export RUN [--out DIR]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle_train.train.load import export_run


def main(arguments: list[str]) -> int:
    """Exports; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train export",
        description="Writes safetensors, config and tokenizer of a run's newest checkpoint.",
    )
    parser.add_argument("run", type=Path, help="run folder, for example runs/toy")
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    options = parser.parse_args(arguments)
    print(export_run(options.run, options.out or options.run / "export"))
    return 0
