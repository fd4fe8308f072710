"""`python -m tests.stuck_ranks CASE FOLDER [overrides]` on two ranks: rank 1 gets stuck in the third step.

Case `loader` is a run of the overrides, which never gets data, and `construction` one which never gets its weights;
`storage` is one rank whose watchdog cannot raise an alarm; `groups` is a run that prints for how many seconds each of
its groups waits instead of training; the others are a loop of few lines with the beats of the trainer.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
import time
from pathlib import Path

from eagle_train import dist
from eagle_train.train.heartbeat import Heart
from eagle_train.train.watchdog import Limits, Watchdog, new_folder

STUCK_STEP = 2
FOR_EVER = 600


def sleep_in(phase: str, case: str, step: int) -> None:
    """Gets rank 1 stuck where the case says."""
    if dist.rank() == 1 and step == STUCK_STEP and case == phase:
        time.sleep(FOR_EVER)
    if dist.rank() == 1 and step == STUCK_STEP and (phase, case) == ("row", "lock"):
        ctypes.PyDLL(None).sleep(FOR_EVER)  # unlike CDLL, it keeps Python's lock
    if dist.rank() == 1 and step == STUCK_STEP and (phase, case) == ("row", "collective"):
        dist.barrier()  # that rank 0, asleep, never comes to
    if dist.rank() == 0 and step == STUCK_STEP and (phase, case) == ("row", "collective"):
        time.sleep(FOR_EVER)


def loop(case: str, folder: Path) -> None:
    """Takes steps until a rank is stuck; with the case `none`, to a good end."""
    dist.init(timeout_seconds=120)
    heart = Heart()
    watchdog = Watchdog(new_folder(folder), heart, Limits(start_seconds=20, step_seconds=3, answer_seconds=4))
    dist.barrier()
    for step in range(5):
        heart.data_keys = lambda step=step: [f"awaited-{step}"]
        heart.beat("data", step)
        time.sleep(0.3)  # the watchdog looks every 0.1 s
        sleep_in("data", case, step)
        heart.beat("agree", step, ["a", "b"])
        dist.all_reduce_sum([1.0])
        heart.beat("row", step, [f"sample-{dist.rank()}-{step}"])
        sleep_in("row", case, step)
        dist.all_reduce_sum([1.0])
    watchdog.close()
    dist.shutdown()


def lose_storage(folder: Path) -> None:
    """Gets stuck when the folder for the alarm is gone."""
    watchdog = Watchdog(new_folder(folder), Heart(), Limits(start_seconds=1, step_seconds=3, answer_seconds=0.5))
    shutil.rmtree(watchdog.folder)
    time.sleep(FOR_EVER)


def stuck_loader(overrides: list[str]) -> int:
    """Runs a run whose rank 1 never gets the rows of a step."""
    from eagle_train.__main__ import main as run  # the other cases need not wait for these
    from eagle_train.data.loader import RowDataset

    make = RowDataset.make
    made: list[int] = []

    def stuck(self, task, allocate):
        made.append(task.row)
        if dist.rank() == 1 and len(made) > STUCK_STEP:
            time.sleep(FOR_EVER)
        return make(self, task, allocate)

    RowDataset.make = stuck
    return run(overrides)


def stuck_construction(overrides: list[str]) -> int:
    """Runs a run whose rank 1 never gets the weights of its model."""
    from eagle_train.__main__ import main as run
    from eagle_train.train.placement import Construction

    finish = Construction.finish

    def stuck(self, **settings):
        if dist.rank() == 1:
            time.sleep(FOR_EVER)
        return finish(self, **settings)

    Construction.finish = stuck
    return run(overrides)


def print_waits(overrides: list[str]) -> None:
    """Prints the time-outs of all groups of a run, seconds, when it is about to train."""
    import torch

    from eagle_train.__main__ import main as run
    from eagle_train.train.trainer import Trainer

    def look(self):
        groups = torch.distributed.distributed_c10d._world.pg_map
        waits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        print("waits:", *(wait.total_seconds() for wait in waits))
        sys.exit(0)

    Trainer.fit = look
    run(overrides)


if __name__ == "__main__":
    case, folder, *overrides = sys.argv[1:]
    if case == "loader":
        sys.exit(stuck_loader(overrides))
    if case == "construction":
        sys.exit(stuck_construction(overrides))
    if case == "groups":
        print_waits(overrides)
    if case == "storage":
        lose_storage(Path(folder))
    loop(case, Path(folder))
