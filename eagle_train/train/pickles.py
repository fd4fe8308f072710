"""Checkpoint files that another library reads with pickle, looked through before it does."""

from __future__ import annotations

from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""What DeepSpeed itself pickles beside tensors and plain values."""


def check_pickles(folder: Path) -> None:
    """Raises ValueError if a `.pt` file in `folder` would call anything that DeepSpeed does not write.

    DeepSpeed unpickles its checkpoints without restriction, so a file from elsewhere could run any code.
    """
    for path in sorted(folder.glob("*.pt")):
        if foreign := sorted(set(get_unsafe_globals_in_checkpoint(path)) - DEEPSPEED):
            raise ValueError(f"{path} was not written by DeepSpeed: it would call {', '.join(foreign)}; delete it")
