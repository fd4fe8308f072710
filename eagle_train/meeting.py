"""How the ranks of a SLURM step find each other: nobody told them a port, and one they would agree on may be taken.

Rank 0 opens torch's store at a port the system chooses, and says which at the first free one of a few ports that all
ranks derive from the job. Who asks there for the store of another run is told so, and looks further.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

ANSWER_SECONDS = 3.0
"""A port that does not answer in this time is not ours."""
RETRY_SECONDS = 0.1
"""From one try to the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the ranks find each other.

    Args:
        address: of rank 0's node.
        ports: of that node, in the order to try.
        token: tells this start of this run from all others. Empty: a launcher says where the store is, at the one port.
    """

    address: str = "127.0.0.1"
    ports: Sequence[int] = (29500,)
    token: str = ""

    def url(self) -> str:
        """Returns the first port as torch is told of it; the colons of an IPv6 address are in brackets."""
        return f"tcp://{f'[{self.address}]' if ':' in self.address else self.address}:{self.ports[0]}"


def meet(meeting: Meeting, rank: int, world_size: int, timeout_seconds: float) -> torch.distributed.Store:
    """Returns the store of the run's ranks, once all of them are there.

    Raises:
        TimeoutError: if none of the ports is free, or rank 0 is not found.
        torch.distributed.DistStoreError: if a rank does not come.
    """
    timeout = timedelta(seconds=timeout_seconds)
    deadline = time.monotonic() + timeout_seconds
    if rank == 0:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        with announcing(meeting, store.port, deadline):
            arrive(store, world_size)
    else:
        port = find(meeting, deadline)
        store = torch.distributed.TCPStore(meeting.address, port, wait_for_workers=False, timeout=timeout)
        arrive(store, world_size)
    return store


def arrive(store: torch.distributed.Store, world_size: int) -> None:
    """Waits until all ranks have arrived; torch itself does not wait when it makes a group for NCCL."""
    if store.add("eagle_train/arrived", 1) == world_size:
        store.set("eagle_train/all", "")
    store.wait(["eagle_train/all"])


def check_alike(store: torch.distributed.Store, rank: int, backend: str) -> None:
    """Compares this rank's backend with that of the rank that comes first: others would wait for one another.

    Raises:
        ValueError: if they differ, which is so if one has a GPU and the other has none.
    """
    mine = f"{backend} {rank} {socket.gethostname()}"
    other, first, host = store.compare_set("eagle_train/backend", "", mine).decode().split(" ", 2)
    if other != backend:
        raise ValueError(
            f"rank {rank} on {socket.gethostname()} would use {backend}, rank {first} on {host} {other}: torch sees "
            "GPUs on only one of them. See what `nvidia-smi` says there; ask for GPUs for every task, or leave the "
            "node out with --exclude"
        )


@contextmanager
def announcing(meeting: Meeting, store_port: int, deadline: float) -> Iterator[None]:
    """Tells all who ask at the first free port of the meeting where the store is."""
    server = first_free(meeting, deadline)
    said, closing = f"{meeting.token} {store_port}\n".encode(), threading.Event()
    thread = threading.Thread(target=answer, args=(server, said, closing), daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        server.shutdown(socket.SHUT_RDWR)  # ends the wait of `accept`
        server.close()
        thread.join()


def answer(server: socket.socket, said: bytes, closing: threading.Event) -> None:
    """Says the same to all who connect, until the server is closed; what goes wrong with one of them is theirs alone.

    Args:
        said: fits into a socket's buffer.
        closing: set before the server is closed.
    """
    while True:
        try:
            asker, _ = server.accept()
        except OSError:
            if closing.wait(RETRY_SECONDS):
                return
            continue  # the connection was reset, or there are too many open files
        with asker, suppress(OSError):  # a port scanner that resets, or a rank that looks elsewhere by now
            asker.sendall(said)


def first_free(meeting: Meeting, deadline: float) -> socket.socket:
    """Returns a socket that listens at the first free port of the meeting, at all addresses of this node."""
    both = socket.has_dualstack_ipv6()
    while True:
        for port in meeting.ports:
            try:
                family = socket.AF_INET6 if both else socket.AF_INET
                return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
            except OSError:
                continue
        wait(meeting, deadline, "no port is free")


def find(meeting: Meeting, deadline: float) -> int:
    """Returns the port of the store, from whoever announces this meeting."""
    while True:
        for port in meeting.ports:
            try:
                with socket.create_connection((meeting.address, port), timeout=ANSWER_SECONDS) as connection:
                    token, _, store_port = connection.recv(1024).decode().partition(" ")
            except (OSError, UnicodeDecodeError):
                continue
            if token == meeting.token and store_port.endswith("\n"):
                return int(store_port)
        wait(meeting, deadline, "rank 0 is not there")


def wait(meeting: Meeting, deadline: float, what: str) -> None:
    """Waits a moment before the next try.

    Raises:
        TimeoutError: if there is no time for one.
    """
    if time.monotonic() > deadline:
        raise TimeoutError(
            f"meeting {meeting.token} at {meeting.address}, ports {list(meeting.ports)}: {what}; set MASTER_ADDR to an "
            "address of rank 0's node that all nodes reach"
        )
    time.sleep(RETRY_SECONDS)
