"""Copies of device memory in host memory, and how much of it there is to give."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from eagle_train import dist
from eagle_train.train.pieces import Piece

BLOCK = 1 << 28
"""Bytes of a block of host memory: a power of two, to which pinned memory would be rounded up anyway."""
KEPT_FREE = 0.1
"""Share of a host's memory that copies leave to loaders and page cache."""
CGROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Limit and use of the memory of a container, version 2 and 1, as seen from inside it, and the name in `memory.stat`,
beside them, of cached files not used of late: they are part of the use, and go when memory is asked for. Source: Linux,
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst."""


class HostCopy:
    """Host memory that pieces are copied into; it is kept, since asking for pinned memory is slow.

    Args:
        block: bytes asked for at once; a piece that goes over the end of a block is cut there.
    """

    def __init__(self, block: int = BLOCK) -> None:
        self.block = block
        self.blocks: list[torch.Tensor] = []

    def missing(self, pieces: Iterable[Piece]) -> int:
        """Returns the bytes of host memory that a copy of the pieces needs beyond what is already kept."""
        return max(0, sum(piece.values.nbytes for piece in pieces) - self.block * len(self.blocks))

    def fill(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Returns copies of the pieces; those of the call before are overwritten.

        Raises:
            RuntimeError: if there is not enough memory.
        """
        copies, number, used = [], 0, 0
        for piece in sorted(pieces, key=lambda piece: -piece.values.itemsize):  # so that all stay aligned
            width, position = piece.values.itemsize, 0
            while position < piece.values.numel():
                if used + width > self.block:
                    number, used = number + 1, 0
                count = min((self.block - used) // width, piece.values.numel() - position)
                room = self._block(number)[used : used + count * width].view(piece.values.dtype)
                room.copy_(piece.values[position : position + count], non_blocking=True)
                copies.append(replace(piece, start=piece.start + position, values=room))
                used, position = used + count * width, position + count
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the next step must not change what is still being copied
        return copies

    def _block(self, number: int) -> torch.Tensor:
        if number == len(self.blocks):
            self.blocks.append(torch.empty(self.block, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))
        return self.blocks[number]


def room_for(needed: int) -> bool:
    """Returns whether every host has room for what its ranks need, the same on every rank; all ranks call it.

    Args:
        needed: bytes that this rank needs.
    """
    hosts: dict[str, tuple[int, float]] = {}
    for host, more, free in dist.gather_objects((socket.gethostname(), needed, free_bytes())):
        wanted, least = hosts.get(host, (0, free))
        hosts[host] = wanted + more, min(least, free)
    return all(wanted <= max(free, 0) for wanted, free in hosts.values())


def free_bytes(root: Path = Path("/")) -> float:
    """Returns the bytes of this host's memory, or of its container's, that copies may take; below 0 on a full one.

    Args:
        root: under which the files about a container's memory are looked for.
    """
    memory = psutil.virtual_memory()
    free = memory.available - KEPT_FREE * memory.total
    for limit, used, cached in CGROUPS:
        if (root / limit).is_file() and (text := (root / limit).read_text().strip()) != "max":
            held = int((root / used).read_text()) - statistic((root / limit).with_name("memory.stat"), cached)
            free = min(free, int(text) * (1 - KEPT_FREE) - held)
    return free


def statistic(path: Path, name: str) -> int:
    """Returns a number of a file of lines `name number`; 0 if it is not there."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
