"""Executes rows of a plan: reads, decodes and packs them in a plain map-style DataLoader.

Nothing here has state: the order is the list of row numbers it is given, so the number of workers cannot
change the result.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset

from eagle_train.data.answers import first_answers
from eagle_train.data.catalog import Catalog
from eagle_train.data.encode import Encoder
from eagle_train.data.index import read_sample, sample_key
from eagle_train.data.packing import pack
from eagle_train.data.plan import Rows, step_rows
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.storage import open_shard
from eagle_train.types import EncodedSample, PackedBatch, Sample, SampleError

MAX_OPEN_SHARDS = 64
"""Per worker; file descriptors are limited, shards are not."""


@dataclass
class RowDataset(Dataset):
    """Rows by number; row -1 is the empty row."""

    catalog: Catalog
    encoder: Encoder
    rows: Rows
    _readers: dict[int, ShardReader] = field(default_factory=dict)

    def __getitem__(self, row: int) -> PackedBatch:
        samples, errors = [], []
        for number in self.rows[row] if row >= 0 else ():
            source = self.catalog.sources[self.catalog.source_ids[number]].name
            try:
                samples.append(self.encode(int(number), source))
            except SampleError as error:
                errors.append((source, error))
        return pack(samples, errors, filler_id=self.encoder.image_id, tile_size=self.encoder.tile_size)

    def encode(self, number: int, source: str) -> EncodedSample:
        """Returns sample `number` encoded.

        Raises:
            SampleError: if it cannot be read or decoded, or its length is not the planned one.
        """
        try:
            sample, data = self.read(number, source)
        except OSError as error:
            shard = self.catalog.shards[self.catalog.shard_ids[number]]
            key = sample_key(source, shard, self.catalog.index_row(number)["key"])
            raise SampleError(key, "missing_shard", f"{shard}: {error}") from error
        pixels = [self.encoder.decode(sample.key, m, d) for m, d in zip(sample.media, data, strict=True)]
        encoded = self.encoder.encode(sample, pixels)
        planned = int(self.catalog.lengths[number])
        if len(encoded.input_ids) != planned:
            detail = f"planned {planned} tokens, encoded {len(encoded.input_ids)}; rebuild the index"
            raise SampleError(sample.key, "length_mismatch", detail)
        return encoded

    def read(self, number: int, source: str) -> tuple[Sample, list[bytes]]:
        """Returns sample `number`, shortened if the catalog says so, and the encoded bytes of its media."""
        reader = self.reader(int(self.catalog.shard_ids[number]))
        row = self.catalog.index_row(number)
        sample = read_sample(reader, source, row)
        if cut := self.catalog.cuts.get(number):
            sample = first_answers(sample, cut.num_answers)
        members = {member["name"]: Member(**member) for member in row["members"]}
        return sample, [reader.read(members[medium.member]) for medium in sample.media]

    def reader(self, shard: int) -> ShardReader:
        """Returns the open reader of a shard; the one used longest ago is closed when there are too many."""
        reader = self._readers.pop(shard, None) or open_shard(self.catalog.shards[shard])
        self._readers[shard] = reader
        if len(self._readers) > MAX_OPEN_SHARDS:
            self._readers.pop(next(iter(self._readers))).close()
        return reader

    def close(self) -> None:
        """Closes the open shards."""
        while self._readers:
            self._readers.popitem()[1].close()


def make_loader(
    dataset: RowDataset,
    *,
    steps: range,
    rows_per_step: int,
    rank: int,
    world_size: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Returns this rank's rows of `steps` in order, one `PackedBatch` each."""
    order: Sequence[int] = [
        row for step in steps for row in step_rows(step, rows_per_step, len(dataset.rows), rank, world_size)
    ]
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin_memory,
        # Its own generator: the loader must not draw from the global one, which resume restores.
        generator=torch.Generator(),
        worker_init_fn=set_up_worker,
    )


def set_up_worker(worker: int) -> None:
    """Keeps a worker to one thread, and leaves signals to its parent, which ends it in good order.

    Schedulers signal every process of a job: a worker that died of SIGTERM would take the parent's save
    with it. A worker whose parent is gone ends by itself.
    """
    del worker
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
