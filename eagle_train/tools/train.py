"""`python -m eagle_train [train] +experiment=NAME [overrides]`."""

from __future__ import annotations

from eagle_train.track.goodput import process_started
from eagle_train.train.app import train
from eagle_train.train.config import load_config, options, to_yaml
from eagle_train.train.preemption import EXIT_CODE

HELP = """usage: python -m eagle_train [train] +experiment=NAME [key=value ...] [--cfg]

Runs the stages of an experiment. The same command resumes where it stopped, from the newest complete
checkpoint under run_dir. Exit code {code}: a signal came, the state is saved, run it again.

  --cfg    print the composed config and stop
  experiments: {experiments}
"""


def main(arguments: list[str]) -> int:
    """Trains; returns the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP.format(code=EXIT_CODE, experiments=", ".join(options("experiment"))))
        return 0
    config = load_config([a for a in arguments if a != "--cfg"])
    if "--cfg" in arguments:
        print(to_yaml(config), end="")
        return 0
    return 0 if train(config, process_started()) else EXIT_CODE
