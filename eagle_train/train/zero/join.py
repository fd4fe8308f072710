"""Importing DeepSpeed, and joining its communication to ours."""

from __future__ import annotations

import logging
import os

import torch

from eagle_train import dist


def import_deepspeed():
    """Returns DeepSpeed.

    On a CPU it would compile a shared-memory operator when it joins the ranks (30 s, needs ninja and a
    compiler), which gloo does not need: it is marked as not built.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if deepspeed.logger.level != logging.WARNING:  # to set it makes every logger forget what it knows
        deepspeed.logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join_deepspeed():
    """Returns DeepSpeed with its communication joined to ours."""
    deepspeed = import_deepspeed()
    dist.init_single()
    dist.export_env()
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
    return deepspeed
