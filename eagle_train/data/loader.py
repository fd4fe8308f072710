"""Executes rows of a plan: reads, decodes and packs them. `step_loader.py` has the workers that do so ahead.

Nothing here has state: a row is a list of sample numbers handed to a worker, so neither the number of workers nor
the death of one can change the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from eagle_train.data.answers import first_answers
from eagle_train.data.catalog import Catalog
from eagle_train.data.collate import pack
from eagle_train.data.elsewhere import Elsewhere
from eagle_train.data.encode import Encoder
from eagle_train.data.index import sample_key
from eagle_train.data.indexed_samples import open_sample
from eagle_train.data.layout import SampleLayout
from eagle_train.data.media_content import Content, read_content
from eagle_train.data.retries import StorageError
from eagle_train.data.row_buffers import Allocate, HandedOver, RowBuffers
from eagle_train.data.shard_reader import ShardReader
from eagle_train.data.storage import Storage, open_shard
from eagle_train.types import EncodedSample, PackedBatch, Sample, SampleError, SampleUse

MAX_OPEN_SHARDS = 64
"""Per worker; file descriptors are limited, shards are not."""


@dataclass(frozen=True, slots=True)
class RowTask:
    """One row to execute."""

    row: int
    """Its number in the stage; -1: the empty row."""
    samples: np.ndarray
    """(K,) int64, sample numbers in the catalog."""
    slot: int = -1
    """Of the `RowBuffers` that the row is handed over in; -1: in none."""


NO_SAMPLES = np.empty(0, dtype=np.int64)


@dataclass
class RowDataset(Dataset):
    """Makes batches of rows."""

    catalog: Catalog
    encoder: Encoder
    storage: Storage | None = None
    left_out: frozenset[tuple[int, int]] = frozenset()
    """Samples (shard, row of its index) that the run has put into quarantine; rows are shorter by them."""
    _readers: dict[int, ShardReader] = field(default_factory=dict, repr=False)

    def __getitem__(self, task: RowTask) -> PackedBatch:
        return self.make(task, torch.empty)

    def make(self, task: RowTask, allocate: Allocate) -> PackedBatch:
        """Returns a row with its larger tensors in memory from `allocate`."""
        numbers = task.samples.tolist()
        layouts = [self.catalog.layout_of(number) for number in numbers]
        encoder = self.encoder
        num_tiles = sum(layout.num_tiles for layout in layouts)
        pixels = allocate((num_tiles, *encoder.tile_shape), dtype=torch.uint8)
        tiles = pixels.numpy()
        samples, errors, uses = [], [], []
        filled = 0
        for number, layout in zip(numbers, layouts, strict=True):
            shard, index = self.catalog.locate(number)
            try:
                if (shard, index) in self.left_out:
                    raise SampleError(
                        self.catalog.key(shard, index), "quarantined", "its loss was wrong, see anomalies"
                    )
                samples.append(self.encode(number, layout, tiles[filled : filled + layout.num_tiles]))
                filled += layout.num_tiles  # only now: the next sample takes the place of a bad one
                uses.append(use(shard, index, layout))
            except SampleError as error:
                errors.append((self.catalog.source_of(shard).name, error))
                uses.append(use(shard, index, None, error))
        return pack(
            samples,
            errors,
            row=task.row,
            uses=uses,
            filler_id=encoder.image_id,
            tile_size=encoder.tile_size,
            tile_depth=encoder.tiling.tile_depth,
            positions=encoder.positions,
            allocate=allocate,
            pixels=pixels[:filled],
        )

    def encode(self, number: int, layout: SampleLayout, tiles: np.ndarray) -> EncodedSample:
        """Returns sample `number` encoded.

        Args:
            tiles: (N, *tile_shape) uint8, where its tiles are decoded to.

        Raises:
            SampleError: if it cannot be read or decoded, or its length is not the planned one.
        """
        # What was cut off may share a token with what stays, so that a shortened text is tokenized again.
        text = None if layout.lost_turns else self.catalog.text(*self.catalog.locate(number))
        sample, data = self.read(number, layout, with_text=text is None)
        self.encoder.decode_all(sample.key, sample.media, layout.media, data, tiles)
        encoded = self.encoder.encode(sample, layout.media, tiles, text)
        if len(encoded.input_ids) != layout.num_tokens:
            detail = f"planned {layout.num_tokens} tokens, encoded {len(encoded.input_ids)}; rebuild the index"
            raise SampleError(sample.key, "length_mismatch", detail)
        return encoded

    def read(self, number: int, layout: SampleLayout, *, with_text: bool = True) -> tuple[Sample, list[Content]]:
        """Returns sample `number`, shortened as planned, and what its media are decoded from.

        Args:
            with_text: False: without messages, see `open_sample`.

        Raises:
            SampleError: if its shard is not there or was cut, or a file outside of it is another one than it was.
            StorageError: if it cannot be read for now.
        """
        shard, index = self.catalog.locate(number)
        here = self.catalog.shards[shard]
        source = self.catalog.source_of(shard)
        elsewhere = Elsewhere(source.media_root, (self.storage or Storage()).retries())
        row = self.catalog.index_row(shard, index)
        try:
            reader = self.reader(shard)
            sample, files = open_sample(reader, source.name, row, elsewhere, with_text=with_text)
            if layout.lost_turns:
                sample = first_answers(sample, layout.num_answers)
            return sample, read_content(files, sample.media, layout.media)
        except StorageError:
            raise  # the shard may well be there: an outage must not pass for bad samples
        except OSError as error:
            key = sample_key(source.name, here.location, row["key"])
            raise SampleError(key, "missing_shard", f"{here.location}: {error}") from error

    def reader(self, shard: int) -> ShardReader:
        """Returns the open reader of a shard; the one used longest ago is closed when there are too many."""
        reader = self._readers.pop(shard, None) or open_shard(self.catalog.shards[shard].location, self.storage)
        self._readers[shard] = reader
        if len(self._readers) > MAX_OPEN_SHARDS:
            self._readers.pop(next(iter(self._readers))).close()
        return reader

    def close(self) -> None:
        """Closes the open shards."""
        while self._readers:
            self._readers.popitem()[1].close()


@dataclass
class SharedRows(Dataset):
    """Makes rows in a worker."""

    rows: RowDataset
    buffers: RowBuffers

    def __getitem__(self, task: RowTask) -> HandedOver | PackedBatch:
        if task.slot < 0:
            return self.rows[task]
        return self.buffers.hand_over(task.slot, self.rows.make(task, self.buffers.allocator(task.slot)))


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
