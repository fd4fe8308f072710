"""`python -m eagle_train [train] +experiment=NAME [overrides]`."""

from __future__ import annotations

import logging

from eagle_train.importing import kept, no_garbage
from eagle_train.train.config import load_config, options, to_yaml, without_effect
from eagle_train.train.exit_codes import PREEMPTED, STALLED

log = logging.getLogger(__name__)

HELP = """usage: python -m eagle_train [train] +experiment=NAME [key=value ...] [--cfg]

Runs the stages of an experiment. The same command resumes where it stopped, from the newest complete
checkpoint under run_dir. Exit code {preempted}: a signal came or the wall time is near, the state is saved, run it
again. Exit code {stalled}: the run was stuck; run_dir/watchdog says where. A batch job of SLURM asks itself to be run
again.

  --cfg    print the composed config and stop
  experiments: {experiments}
"""


def main(arguments: list[str]) -> int:
    """Trains; returns the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP.format(preempted=PREEMPTED, stalled=STALLED, experiments=", ".join(options("experiment"))))
        return 0
    overrides = [a for a in arguments if a != "--cfg"]
    config = load_config(overrides)
    for override in without_effect(overrides, config):
        log.warning("%s does not reach training: every stage has its own; see `schedule` in --cfg", override)
    if "--cfg" in arguments:
        print(to_yaml(config), end="")
        return 0
    # Torch and what stands on it take seconds to import: a question or a mistake need not wait for them.
    with no_garbage():
        from eagle_train.track.goodput import process_started
        from eagle_train.train.app import train
        from eagle_train.train.preemption import ignore_signals
    with kept():  # DeepSpeed asks for full collections
        complete = train(config, process_started())
    if complete:
        return 0
    ignore_signals()
    return PREEMPTED
