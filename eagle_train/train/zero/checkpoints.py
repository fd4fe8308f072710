"""What `ZeroEngine` writes and reads: every rank its shards."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from eagle_train import dist
from eagle_train.train.optim import keeping_hyperparameters
from eagle_train.train.pickles import check_pickles
from eagle_train.train.zero.join import import_deepspeed

TAG = "zero"
WHOLE = "mp_rank_00_model_states.pt"
"""Weights in a checkpoint of stages 1 and 2; stage 3 has one file of this kind per rank, of shards."""


def save_shards(engine, folder: Path) -> None:
    """Writes this rank's shards of a DeepSpeed engine; `latest` is ours to publish, never DeepSpeed's."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load_shards(engine, optimizer, folder: Path, *, sharded: bool) -> None:
    """Restores this rank's shards into a DeepSpeed engine.

    Args:
        sharded: whether the engine's weights are, as in stage 3.

    Raises:
        ValueError: if the checkpoint was written by another number of ranks or another engine.
    """
    shards = len(list((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt")))
    if shards != dist.world_size():
        raise ValueError(
            f"{folder} holds ZeRO shards of {shards} ranks, this run has {dist.world_size()}; "
            f"go on with {shards} ranks and the engine that wrote them"
        )
    if (folder / TAG / WHOLE).exists() == sharded:
        raise ValueError(
            f"{folder} holds {'whole' if sharded else 'sharded'} weights, which this engine cannot read; "
            f"go on with engine.zero_stage={'1 or 2' if sharded else '3'}"
        )
    check_pickles(folder / TAG)
    with keeping_hyperparameters(optimizer):
        path, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if path is None:
        raise ValueError(f"DeepSpeed found nothing to load in {folder / TAG}")


def read_zero_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a checkpoint that `ZeroEngine` wrote, by parameter name, as they were trained.

    Shards are merged from their float32 masters; under bf16 these are rounded to what the model computed with.
    """
    path = checkpoint / TAG / WHOLE
    if path.exists():
        return torch.load(path, map_location="cpu", weights_only=True)["module"]
    import_deepspeed()
    check_pickles(checkpoint / TAG)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(sys.stderr):  # it prints what it does
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    stored = torch.load(checkpoint / TAG / f"zero_pp_rank_0_{WHOLE}", map_location="cpu", weights_only=True)
    return {name: weights[name].to(tensor.dtype) for name, tensor in stored["module"].items()}
