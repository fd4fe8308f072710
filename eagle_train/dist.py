"""Who am I among the processes of a run, and the few small collectives the project needs.

The sole reader of rank variables: those of `torchrun`, those of a SLURM step started by `srun` (`eagle_train.slurm`
knows their names), or neither, which is one single process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from eagle_train import slurm
from eagle_train.meeting import Meeting, check_alike, meet

PORTS_TO_TRY = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The place of this process in the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def place_from_env(env: Mapping[str, str]) -> Place:
    """Returns the place that the launcher wrote into `env`."""
    if by_torchrun(env):
        return Place(
            rank=int(env["RANK"]),
            local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
            world_size=int(env["WORLD_SIZE"]),
        )
    if slurm.in_step(env):
        return Place(rank=slurm.rank(env), local_rank=slurm.local_rank(env), world_size=slurm.world_size(env))
    return Place()


def by_torchrun(env: Mapping[str, str]) -> bool:
    """Returns whether `env` has the variables of `torchrun`; one of them alone is somebody else's."""
    return "RANK" in env and "WORLD_SIZE" in env


def meeting_from_env(env: Mapping[str, str]) -> Meeting:
    """Returns where the ranks meet; `MASTER_ADDR` and `MASTER_PORT` win over what SLURM tells."""
    if by_torchrun(env) or not slurm.in_step(env):
        return Meeting(address=env.get("MASTER_ADDR", "127.0.0.1"), ports=[int(env.get("MASTER_PORT", "29500"))])
    return Meeting(
        address=env.get("MASTER_ADDR") or slurm.master_address(env),
        ports=[int(env["MASTER_PORT"])] if env.get("MASTER_PORT") else slurm.ports(env, PORTS_TO_TRY),
        token=slurm.step_token(env),
    )


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
        return torch.device("cuda", gpu(place().local_rank, torch.cuda.device_count()))
    return torch.device("cpu")


def gpu(local_rank: int, visible: int) -> int:
    """Returns which of the visible GPUs a rank computes on.

    A launcher shows each task all GPUs of the node or, with `--gpus-per-task`, its own alone: then that is GPU 0.
    """
    return local_rank % visible


def init(timeout_seconds: float = 1800.0) -> None:
    """Joins the process group (NCCL on GPUs, gloo on CPUs); does nothing for a single process.

    Raises:
        TimeoutError: under SLURM, if rank 0 cannot be found.
        ValueError: under SLURM, if only some ranks see a GPU.
    """
    here = place()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())  # collectives of objects go through the current device
    if here.world_size == 1 or torch.distributed.is_initialized():
        return
    meeting, timeout = meeting_from_env(os.environ), timedelta(seconds=timeout_seconds)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    group = {"rank": here.rank, "world_size": here.world_size, "timeout": timeout}
    if not meeting.token:  # torchrun has a store of its own at that port
        torch.distributed.init_process_group(backend, init_method=meeting.url(), **group)
        return
    store = meet(meeting, here.rank, here.world_size, timeout_seconds)
    check_alike(store, here.rank, backend)
    torch.distributed.init_process_group(backend, store=store, **group)


def init_single() -> None:
    """Makes a process group of one where there is none; DeepSpeed wants one."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def wait_at_most(seconds: float) -> None:
    """Lets collectives of every group that there is now wait so long before they give up; all ranks call it.

    Torch gives a group that is made without a time-out, as DeepSpeed makes its own, 10 minutes under NCCL, whatever
    `init` was told: a rank that is slow, but for less time than it may be, would end the run there.
    """
    for group in torch.distributed.distributed_c10d._world.pg_map:  # there is no public list, as of torch 2.15
        # Later releases call it `set_timeout` and warn about the old name.
        old_name = torch.distributed.distributed_c10d._set_pg_timeout
        getattr(torch.distributed, "set_timeout", old_name)(timedelta(seconds=seconds), group)


def export_env() -> None:
    """Writes this process's place into the environment in torchrun's names, for libraries that read them.

    They take the local rank for the number of this process's GPU, which it is not where a process sees its own alone.
    """
    here, meeting, own_gpu = place(), meeting_from_env(os.environ), device().index
    os.environ |= {
        "RANK": str(here.rank),
        "LOCAL_RANK": str(here.local_rank if own_gpu is None else own_gpu),
        "WORLD_SIZE": str(here.world_size),
        "MASTER_ADDR": meeting.address,
        "MASTER_PORT": str(meeting.ports[0]),
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
