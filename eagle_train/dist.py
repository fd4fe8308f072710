"""Who am I among the processes of a run, and the few small collectives the project needs.

The sole reader of rank variables: those of `torchrun`, those of a SLURM step started by `srun`, or
neither, which is one single process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The place of this process in the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500


def place_from_env(env: Mapping[str, str]) -> Place:
    """Returns the place that the launcher wrote into `env`.

    Under SLURM only the variables that `srun` sets for the tasks of a step count: those of a batch
    script (`SLURM_NTASKS`) would make a single process wait for others that were never started.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(
            rank=int(env["RANK"]),
            local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
            world_size=int(env["WORLD_SIZE"]),
            master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(env.get("MASTER_PORT", "29500")),
        )
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        job = int(env.get("SLURM_JOB_ID", "0"))
        return Place(
            rank=int(env["SLURM_PROCID"]),
            local_rank=int(env["SLURM_LOCALID"]),
            world_size=int(env["SLURM_STEP_NUM_TASKS"]),
            # Node names need not resolve; the launch node's address always does.
            master_addr=env.get("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")),
            master_port=int(env.get("MASTER_PORT", 20000 + job % 20000)),
        )
    return Place()


def place() -> Place:
    """Returns the place of this process."""
    return place_from_env(os.environ)


def rank() -> int:
    """Returns this process's rank among all."""
    return place().rank


def world_size() -> int:
    """Returns the number of processes of the run."""
    return place().world_size


def device() -> torch.device:
    """Returns the device this rank computes on: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", place().local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def init(timeout_seconds: float = 1800.0) -> None:
    """Joins the process group (NCCL on GPUs, gloo on CPUs); does nothing for a single process."""
    here = place()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())  # collectives of objects go through the current device
    if here.world_size == 1 or torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        backend="nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{here.master_addr}:{here.master_port}",
        rank=here.rank,
        world_size=here.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def init_single() -> None:
    """Makes a process group of one where there is none; DeepSpeed wants one."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def export_env() -> None:
    """Writes this process's place into the environment in torchrun's names, for libraries that read them.

    They take the local rank for the number of this process's GPU, which it is not where a process sees its own alone.
    """
    here = place()
    gpu = device().index
    os.environ |= {
        "RANK": str(here.rank),
        "LOCAL_RANK": str(here.local_rank if gpu is None else gpu),
        "WORLD_SIZE": str(here.world_size),
        "MASTER_ADDR": here.master_addr,
        "MASTER_PORT": str(here.master_port),
    }


def shutdown() -> None:
    """Leaves the process group at the good end of a run; all ranks call it.

    The barrier avoids an abort seen when a rank leaves during a collective. After an error there is no
    leaving in good order: the process ends, and its launcher ends the others.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Waits for every rank."""
    if world_size() > 1:
        torch.distributed.barrier()


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Returns the element-wise sum of `values` over all ranks, in float64."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(box, value)
    return box
