"""Steps with the rows of one rank, made ahead by workers of a plain map-style DataLoader."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import wait

import torch
from torch.utils.data import DataLoader

from eagle_train.data.ahead import HELD, ahead
from eagle_train.data.balance import deal
from eagle_train.data.heap import keep_freed_memory
from eagle_train.data.loader import NO_SAMPLES, RowDataset, RowTask, SharedRows
from eagle_train.data.row_buffers import HandedOver, RowBuffers
from eagle_train.data.stream import Step
from eagle_train.types import PackedBatch

log = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Of the workers, within one step; what kills them every time would do so for ever."""
DEATH = "DataLoader worker (pid"
"""How torch's message about a dead worker begins."""
DEATH_SECONDS = 1.0
"""How long the system may take to tell of a death."""
SHOWN = 20
"""Keys in a message."""
LAST_SECONDS = 600
"""How long a worker outlives a SIGTERM at most."""


@dataclass(kw_only=True)
class StepLoader:
    """Yields each step with this rank's rows of it, one `PackedBatch` per micro-batch.

    With workers, the rows of the next step are collected, and pinned, while the last one is in use, and the tensors of
    a step are valid until the next one is asked for. A worker that dies (out of memory,
    a signal) is replaced: the steps that were not delivered are made again. If that happens over and over in one
    step, a ValueError names the samples it was about.

    Args:
        dataset: makes the rows.
        steps: of the plan, from the next one on.
        rank, world_size: which rows of a step are this rank's.
        micro_batches: rows of each rank per step, empty ones included.
        num_workers: processes; 0 makes the rows in this one.
        prefetch: rows that each worker makes ahead.
        pin_memory: rows are copied to page-locked memory, for copies to a GPU that do not wait.
        row_bytes: of the largest row, see `row_buffers`; 0: rows are handed over as torch does it.
    """

    dataset: RowDataset
    steps: Iterable[Step]
    rank: int
    world_size: int
    micro_batches: int
    num_workers: int
    prefetch: int = 4
    pin_memory: bool = False
    row_bytes: int = 0
    _sent: deque[Step] = field(default_factory=deque, repr=False)

    def __iter__(self) -> Generator[tuple[Step, list[PackedBatch]]]:
        device = torch.cuda.current_device() if self.pin_memory else None
        return ahead(self._made(device)) if self.num_workers else self._made(device)

    def _made(self, device: int | None) -> Generator[tuple[Step, list[PackedBatch]]]:
        """Yields what the loader does.

        Args:
            device: number of the GPU whose driver pins memory; it is set for each thread on its own.
        """
        if device is not None:
            torch.cuda.set_device(device)
        steps = iter(self.steps)
        unsent: deque[Step] = deque()
        restarts = 0
        while True:
            sent = self._sent = deque()
            workers = Workers(self, unsent, steps, sent)
            try:
                for rows in workers:
                    yield sent.popleft(), rows
                    restarts = 0
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not workers.have_died(error):
                    raise
                if restarts == MAX_RESTARTS:
                    raise ValueError(self._no_use(sent, error)) from error
                restarts += 1
                log.warning("%s; starting the workers again (%d of %d)", error, restarts, MAX_RESTARTS)
            finally:
                workers.close()
            unsent.extendleft(reversed(sent))

    def _no_use(self, sent: Sequence[Step], error: Exception) -> str:
        """Returns what to say when workers keep dying."""
        keys = self.keys(sent[0])
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        return (
            f"the loader's workers died {MAX_RESTARTS + 1} times before step {sent[0].number} was made ({error}); if "
            "memory ran out, lower data.num_workers or data.prefetch; data.num_workers=0 shows where. "
            f"Samples of the step on rank {self.rank}: {', '.join(keys[:SHOWN])}{more}"
        )

    def awaited(self) -> list[str]:
        """Returns the keys of this rank's samples of the oldest step that is not made; other threads may ask."""
        sent = list(self._sent)
        return self.keys(sent[0]) if sent else []

    def keys(self, step: Step) -> list[str]:
        """Returns the keys of this rank's samples of a step."""
        catalog = self.dataset.catalog
        rows = [step.rows[row] for row in self.mine(step) if row >= 0]
        return [catalog.key(*catalog.locate(number)) for row in rows for number in row.tolist()]

    def mine(self, step: Step) -> list[int]:
        """Returns this rank's rows of a step, one per micro-batch; -1 is the empty row."""
        rows = deal(step.costs, self.world_size)[self.rank]
        return rows + [-1] * (self.micro_batches - len(rows))


class Workers:
    """One generation of workers.

    Args:
        loader: whose rows they make.
        unsent: steps to make first.
        steps: to make after these.
        sent: gets each step before its rows are made; who takes the rows of a step takes the step out.
    """

    def __init__(self, loader: StepLoader, unsent: deque[Step], steps: Iterator[Step], sent: deque[Step]) -> None:
        self._loader = loader
        self._unsent, self._steps, self._sent = unsent, steps, sent
        self._buffers: RowBuffers | None = None
        dataset = loader.dataset
        by_fork = torch.multiprocessing.get_start_method() == "fork"
        if loader.num_workers and loader.row_bytes and by_fork:
            # Under way, held by whoever takes the steps, and those of the step that is being collected.
            slots = loader.num_workers * loader.prefetch + (HELD + 1) * loader.micro_batches
            self._buffers = RowBuffers(slots, loader.row_bytes)
            dataset = SharedRows(dataset, self._buffers)
        self._free = deque(range(self._buffers.num_slots if self._buffers else 0))
        others = set(multiprocessing.active_children())
        self._batches = self._start(dataset)
        self._processes = set(multiprocessing.active_children()) - others

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        held: deque[tuple[list[int], list[PackedBatch]]] = deque()
        for first in self._batches:
            made = [first, *islice(self._batches, self._loader.micro_batches - 1)]
            slots = [row.slot for row in made if isinstance(row, HandedOver)]
            rows = [self._take(row) for row in made]
            yield rows
            # Who frees a tensor lets go of Python's lock: done here, it costs the one who trains no wait for it.
            held.append((slots, rows if slots else []))
            if len(held) > HELD:
                self._free.extend(held.popleft()[0])

    def close(self) -> None:
        """Ends the processes; Python's own end would wait for them, and they pass over its signal."""
        self._batches = iter(())  # in good order, unless the traceback of an error still holds the old one
        for process in self._processes:
            process.kill()

    def have_died(self, error: Exception) -> bool:
        """Returns whether an error means that a worker is dead.

        Where it died while it handed over a row, the error is about a connection or a file that is gone.
        """
        if str(error).startswith(DEATH):
            return True
        ends = [process.sentinel for process in self._processes]
        return bool(ends and wait(ends, DEATH_SECONDS))

    def _take(self, row: HandedOver | PackedBatch) -> PackedBatch:
        batch = self._buffers.take(row) if isinstance(row, HandedOver) else row
        return batch.pin_memory() if self._loader.pin_memory else batch

    def _tasks(self) -> Iterator[RowTask]:
        while (step := self._unsent.popleft() if self._unsent else next(self._steps, None)) is not None:
            self._sent.append(step)
            for row in self._loader.mine(step):
                slot = self._free.popleft() if self._free else -1
                yield RowTask(-1, NO_SAMPLES, slot) if row < 0 else RowTask(step.first_row + row, step.rows[row], slot)

    def _start(self, dataset: RowDataset | SharedRows) -> Iterator[HandedOver | PackedBatch]:
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._tasks(),
            num_workers=self._loader.num_workers,
            prefetch_factor=self._loader.prefetch if self._loader.num_workers else None,
            # Its own generator: the loader must not draw from the global one, which resume restores.
            generator=torch.Generator(),
            worker_init_fn=set_up_worker,
        )
        # In the thread that collects, torch sets no handler of SIGCHLD; it would raise wherever the main thread is when
        # a worker dies; without it the next read notices.
        return iter(loader)


def set_up_worker(worker: int) -> None:
    """Keeps a worker to one thread and its own garbage, and leaves signals to its parent, which ends it in good order.

    Schedulers signal every process of a job: a worker that died of SIGTERM at once would take the parent's save
    with it. A worker whose parent is gone ends by itself; one whose parent has forgotten it, after a while.
    """
    del worker
    torch.set_num_threads(1)
    keep_freed_memory()
    # What it inherits stays: to look for garbage in all of it takes long, again and again, and would copy its pages.
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SECONDS))
