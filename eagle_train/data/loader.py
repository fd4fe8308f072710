"""Executes rows of a plan: reads, decodes and packs them in a plain map-style DataLoader.

Nothing here has state: a row is a list of sample numbers handed to a worker, so neither the number of workers nor
the death of one can change the result.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from eagle_train.data.answers import first_answers
from eagle_train.data.balance import deal
from eagle_train.data.catalog import Catalog
from eagle_train.data.collate import pack
from eagle_train.data.encode import Encoder
from eagle_train.data.index import read_sample, sample_key
from eagle_train.data.layout import SampleLayout
from eagle_train.data.shards import Member, ShardReader
from eagle_train.data.stream import Step
from eagle_train.types import EncodedSample, PackedBatch, Sample, SampleError, SampleUse

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 64
"""Per worker; file descriptors are limited, shards are not."""
MAX_RESTARTS = 3
"""Of the workers, within one step; what kills them every time would do so for ever."""
DEATHS = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")
"""How torch's messages about a dead worker begin; the second comes where one died while it handed over a row."""
DEATH_SECONDS = 1.0
SHOWN = 20
"""Keys in a message."""


@dataclass(frozen=True, slots=True)
class RowTask:
    """One row to execute."""

    row: int
    """Its number in the stage; -1: the empty row."""
    samples: np.ndarray
    """(K,) int64, sample numbers in the catalog."""


EMPTY_ROW = RowTask(-1, np.empty(0, dtype=np.int64))


@dataclass
class RowDataset(Dataset):
    """Makes batches of rows."""

    catalog: Catalog
    encoder: Encoder
    _readers: dict[int, ShardReader] = field(default_factory=dict, repr=False)

    def __getitem__(self, task: RowTask) -> PackedBatch:
        samples, errors, uses = [], [], []
        for number in task.samples.tolist():
            shard, index = self.catalog.locate(number)
            layout = self.catalog.sizes(shard).layout(index)
            try:
                samples.append(self.encode(number, layout))
                uses.append(use(shard, index, layout))
            except SampleError as error:
                errors.append((self.catalog.source_of(shard).name, error))
                uses.append(use(shard, index, None, error))
        return pack(
            samples,
            errors,
            row=task.row,
            uses=uses,
            filler_id=self.encoder.image_id,
            tile_size=self.encoder.tile_size,
        )

    def encode(self, number: int, layout: SampleLayout) -> EncodedSample:
        """Returns sample `number` encoded.

        Raises:
            SampleError: if it cannot be read or decoded, or its length is not the planned one.
        """
        sample, data = self.read(number, layout)
        media = zip(sample.media, layout.media, data, strict=True)
        pixels = [self.encoder.decode(sample.key, medium, plan, content) for medium, plan, content in media]
        encoded = self.encoder.encode(sample, layout.media, pixels)
        if len(encoded.input_ids) != layout.num_tokens:
            detail = f"planned {layout.num_tokens} tokens, encoded {len(encoded.input_ids)}; rebuild the index"
            raise SampleError(sample.key, "length_mismatch", detail)
        return encoded

    def read(self, number: int, layout: SampleLayout) -> tuple[Sample, list[bytes]]:
        """Returns sample `number`, shortened as planned, and the encoded bytes of its media.

        Raises:
            SampleError: if its shard cannot be read.
        """
        shard, index = self.catalog.locate(number)
        here = self.catalog.shards[shard]
        source = self.catalog.source_of(shard).name
        row = self.catalog.index_row(shard, index)
        try:
            reader = self.reader(shard)
            sample = read_sample(reader, source, row)
            if layout.lost_turns:
                sample = first_answers(sample, layout.num_answers)
            members = {member["name"]: Member(**member) for member in row["members"]}
            return sample, [reader.read(members[medium.member]) for medium in sample.media]
        except OSError as error:
            key = sample_key(source, here.location, row["key"])
            raise SampleError(key, "missing_shard", f"{here.location}: {error}") from error

    def reader(self, shard: int) -> ShardReader:
        """Returns the open reader of a shard; the one used longest ago is closed when there are too many."""
        reader = self._readers.pop(shard, None) or ShardReader(self.catalog.shards[shard].location)
        self._readers[shard] = reader
        if len(self._readers) > MAX_OPEN_SHARDS:
            self._readers.pop(next(iter(self._readers))).close()
        return reader

    def close(self) -> None:
        """Closes the open shards."""
        while self._readers:
            self._readers.popitem()[1].close()


def use(shard: int, index: int, layout: SampleLayout | None, error: SampleError | None = None) -> SampleUse:
    """Returns what became of a sample, for the ledger: it was used as laid out, or there is an error."""
    return SampleUse(
        shard=shard,
        index=index,
        num_tokens=layout.num_tokens if layout else 0,
        num_targets=layout.num_targets if layout else 0,
        num_tiles=layout.num_tiles if layout else 0,
        num_frames=layout.num_frames if layout else 0,
        error=error,
    )


@dataclass(kw_only=True)
class StepLoader:
    """Yields each step with this rank's rows of it, one `PackedBatch` per micro-batch.

    A worker that dies (out of memory, a signal) is replaced: the steps that were not delivered are made again. If
    that happens over and over in one step, a ValueError names the samples it was about.

    Args:
        dataset: makes the rows.
        steps: of the plan, from the next one on.
        rank, world_size: which rows of a step are this rank's.
        micro_batches: rows of each rank per step, empty ones included.
        num_workers: processes; 0 makes the rows in this one.
        prefetch: rows that each worker makes ahead.
        pin_memory: for copies to a GPU.
    """

    dataset: RowDataset
    steps: Iterable[Step]
    rank: int
    world_size: int
    micro_batches: int
    num_workers: int
    prefetch: int = 4
    pin_memory: bool = False

    def __iter__(self) -> Generator[tuple[Step, list[PackedBatch]]]:
        steps = iter(self.steps)
        unsent: deque[Step] = deque()
        restarts = 0
        while True:
            sent: deque[Step] = deque()
            others = set(multiprocessing.active_children())
            batches = self._start(self._tasks(unsent, steps, sent))
            workers = set(multiprocessing.active_children()) - others
            try:
                for first in batches:
                    rows = [first, *islice(batches, self.micro_batches - 1)]
                    yield sent.popleft(), rows
                    restarts = 0
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not is_death(error, workers):
                    raise
                if restarts == MAX_RESTARTS:
                    raise ValueError(self._no_use(sent, error)) from error
                restarts += 1
                log.warning("%s; starting the workers again (%d of %d)", error, restarts, MAX_RESTARTS)
            finally:
                del batches  # ends the workers in good order, unless the traceback of an error still holds it
                for worker in workers:
                    # They ignore SIGTERM, with which Python would end them at its exit, and wait for them for ever.
                    worker.kill()
            unsent.extendleft(reversed(sent))

    def _no_use(self, sent: Sequence[Step], error: Exception) -> str:
        """Returns what to say when workers keep dying."""
        catalog = self.dataset.catalog
        rows = [sent[0].rows[row] for row in self._mine(sent[0]) if row >= 0]
        keys = [catalog.key(*catalog.locate(number)) for row in rows for number in row.tolist()]
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        return (
            f"the loader's workers died {MAX_RESTARTS + 1} times before step {sent[0].number} was made ({error}); if "
            "memory ran out, lower data.num_workers or data.prefetch; data.num_workers=0 shows where. "
            f"Samples of the step on rank {self.rank}: {', '.join(keys[:SHOWN])}{more}"
        )

    def _mine(self, step: Step) -> list[int]:
        """Returns this rank's rows of a step, one per micro-batch; -1 is the empty row."""
        rows = deal(step.costs, self.world_size)[self.rank]
        return rows + [-1] * (self.micro_batches - len(rows))

    def _tasks(self, unsent: deque[Step], steps: Iterator[Step], sent: deque[Step]) -> Iterator[RowTask]:
        """Yields the rows of the steps of `unsent`, then of `steps`; a step is in `sent` before its rows are."""
        while (step := unsent.popleft() if unsent else next(steps, None)) is not None:
            sent.append(step)
            for row in self._mine(step):
                yield EMPTY_ROW if row < 0 else RowTask(step.first_row + row, step.rows[row])

    def _start(self, tasks: Iterator[RowTask]) -> Iterator[PackedBatch]:
        """Starts the workers."""
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=tasks,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            pin_memory=self.pin_memory,
            # Its own generator: the loader must not draw from the global one, which resume restores.
            generator=torch.Generator(),
            worker_init_fn=set_up_worker,
        )
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        # torch's handler raises wherever the main thread is when a worker dies; without it the next read notices.
        signal.signal(signal.SIGCHLD, handler)
        return batches


def is_death(error: Exception, workers: Iterable[BaseProcess]) -> bool:
    """Returns whether an error means that a worker is dead.

    Where it died while it handed over a row, the error is about a connection or a file that is gone, and the system
    may take a moment to tell of the death.
    """
    if str(error).startswith(DEATHS):
        return True
    ends = [worker.sentinel for worker in workers]
    return bool(ends and wait(ends, DEATH_SECONDS))


def set_up_worker(worker: int) -> None:
    """Keeps a worker to one thread, and leaves signals to its parent, which ends it in good order.

    Schedulers signal every process of a job: a worker that died of SIGTERM would take the parent's save
    with it. A worker whose parent is gone ends by itself.
    """
    del worker
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
