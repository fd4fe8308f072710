"""`python -m tests.killed_save FOLDER`: is killed in the middle of its second checkpoint, in the background."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from eagle_train.train import tensor_file
from eagle_train.train.checkpoint import CheckpointDir
from eagle_train.train.saving import Saver
from tests.train.test_saving import FILES, make_engine, train_step


def main(folder: Path) -> None:
    """Saves once, and begins to save again."""
    engine = make_engine()
    saver = Saver(CheckpointDir(folder), background=True)
    assert saver.save(engine, 1, FILES).published
    raw, written = tensor_file.raw, []

    def killing(tensor: torch.Tensor):
        written.append(1)
        if len(written) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return raw(tensor)

    tensor_file.raw = killing
    saver.save(engine, 2, FILES, wait=False)
    while True:
        train_step(engine)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
