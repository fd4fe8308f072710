"""All samples of a stage's sources: where they are and how many tokens they take, mapped from disk shard by shard.

A sample's number is its shard's start plus its row in the shard's index. Nothing grows with the number of samples
but files that all ranks and workers of a node share through the page cache.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from eagle_train.data.index import index_path, index_stem, sample_key
from eagle_train.data.layout import COUNTS, PAIRS, SampleLayout, Summary, layout_path, texts_path
from eagle_train.data.locations import Location, file_name, shown
from eagle_train.data.tables import Rows, read_table
from eagle_train.data.text_tokens import StoredTexts, TextTokens
from eagle_train.data.too_long import Shortened
from eagle_train.types import MediaPlan, SampleError

MAX_OPEN = 256
"""Mapped files of a kind that are kept open."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of a mix.

    Args:
        name: as in reports and errors.
        shards: where its tars are, sorted.
        repeat: passes over it per epoch; 0.5, or 1/2, takes a seeded half.
        weight: its share of an epoch instead, relative to the other sources' weights; None: `repeat` counts.
        index_dir: where its indexes are; None: beside the shards.
        media_root: folder of files that its records may name beside the members of its tars; None: they may name none.
        max_bad_share: largest share of it that may be bad; None: that of the run.
    """

    name: str
    shards: Sequence[Location]
    repeat: float | Fraction = 1.0
    weight: float | None = None
    index_dir: Path | None = None
    media_root: Path | None = None
    max_bad_share: float | None = None

    def bad_share(self, default: float) -> float:
        """Returns the largest share that may be bad; `default` is the run's."""
        return default if self.max_bad_share is None else self.max_bad_share


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogShard:
    """One shard: its sums, and where its files are."""

    source: int
    """Into the catalog's sources."""
    location: Location
    index_dir: Path | None
    summary: Summary
    quarantined: tuple[int, ...] = ()
    """Rows that the plan leaves out."""
    lost: bool = False
    """It is not there: every sample of it is bad."""


class Sizes:
    """The columns of one shard's layout (n samples), mapped.

    Args:
        table: see `layout.SCHEMA`.
        quarantined: rows that count as unusable.
    """

    def __init__(self, table: pa.Table, quarantined: Sequence[int] = ()) -> None:
        table = table.combine_chunks()
        columns = {name: table[name].to_numpy() for name in COUNTS}
        self.num_tokens: np.ndarray = columns["num_tokens"]
        """(n,) int32; 0 for a sample that cannot be used."""
        if len(quarantined):
            self.num_tokens = self.num_tokens.copy()
            self.num_tokens[list(quarantined)] = 0
        self.num_targets: np.ndarray = columns["num_targets"]
        """(n,) int32."""
        self.num_tiles: np.ndarray = columns["num_tiles"]
        """(n,) int32."""
        self.num_tile_pairs: np.ndarray = table[PAIRS].to_numpy()
        """(n,) int64."""
        self._table = table
        self._rows = Rows(table.select([*COUNTS, "media"]))

    def __len__(self) -> int:
        return len(self.num_tokens)

    def layout(self, row: int) -> SampleLayout:
        """Returns the layout of a usable sample."""
        values = self._rows[row]
        del values["num_tiles"]  # the media tell
        return SampleLayout(**values | {"media": tuple(MediaPlan(**plan) for plan in values["media"])})

    def errors(self) -> Iterator[tuple[int, str, str]]:
        """Yields (row, reason, detail) of the samples that cannot be used; quarantined ones are not among them."""
        reasons = self._table["reason"]
        for row in np.flatnonzero(reasons.is_valid().to_numpy()).tolist():
            yield row, reasons[row].as_py(), self._table["detail"][row].as_py()


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The samples of all sources.

    Args:
        sources: in the order of the recipe.
        shards: source by source.
        layout: fingerprint of the layout.
    """

    sources: Sequence[Source]
    shards: Sequence[CatalogShard]
    layout: str
    _sizes: dict[int, Sizes] = field(default_factory=dict, repr=False, compare=False)
    _indexes: dict[int, Rows] = field(default_factory=dict, repr=False, compare=False)
    _texts: dict[int, StoredTexts] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_sizes": {}, "_indexes": {}, "_texts": {}}  # another process maps the files itself

    @cached_property
    def starts(self) -> np.ndarray:
        """(number of shards + 1,) int64: number of the first sample of each shard."""
        return np.cumsum([0, *(shard.summary.num_samples for shard in self.shards)], dtype=np.int64)

    @cached_property
    def _first_numbers(self) -> list[int]:
        """`starts` again: numpy takes ten times as long to look up one number."""
        return self.starts.tolist()

    @cached_property
    def shard_sources(self) -> np.ndarray:
        """(number of shards,) int32: source of each shard."""
        return np.array([shard.source for shard in self.shards], dtype=np.int32)

    def locate(self, number: int) -> tuple[int, int]:
        """Returns the shard of a sample and its row there."""
        shard = bisect_right(self._first_numbers, number) - 1
        return shard, number - self._first_numbers[shard]

    def source_of(self, shard: int) -> Source:
        """Returns the source of a shard."""
        return self.sources[self.shards[shard].source]

    def source_of_sample(self, number: int) -> Source:
        """Returns the source of a sample."""
        return self.source_of(self.locate(number)[0])

    def count_sources(self, numbers: np.ndarray) -> np.ndarray:
        """Returns (number of sources,) int64: how many of the samples `numbers` each source has."""
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        return np.bincount(self.shard_sources[shards], minlength=len(self.sources))

    def layout_of(self, number: int) -> SampleLayout:
        """Returns the layout of a usable sample."""
        shard, row = self.locate(number)
        return self.sizes(shard).layout(row)

    def sizes(self, shard: int) -> Sizes:
        """Returns the sizes of a shard's samples."""
        return recall(self._sizes, shard, self._map_sizes)

    def index_row(self, shard: int, row: int) -> dict:
        """Returns key, members, media and files outside of a sample's index row, see `index.SCHEMA`."""
        return recall(self._indexes, shard, self._map_index)[row]

    def text(self, shard: int, row: int) -> TextTokens:
        """Returns the tokens of a sample's whole text."""
        return recall(self._texts, shard, self._map_texts)[row]

    def key(self, shard: int, row: int) -> str:
        """Returns the key that names a sample everywhere."""
        here = self.shards[shard]
        key = f"sample {row} of {here.summary.num_samples}" if here.lost else self.index_row(shard, row)["key"]
        return sample_key(self.sources[here.source].name, here.location, key)

    def source_sizes(self) -> list[int]:
        """Returns the number of samples of each source, bad ones included."""
        return [summary.num_samples for summary in self.source_summaries()]

    def source_summaries(self) -> list[Summary]:
        """Returns the sums of each source."""
        sums = [Summary(num_samples=0) for _ in self.sources]
        for shard in self.shards:
            sums[shard.source] = add(sums[shard.source], shard.summary)
        return sums

    def dropped(self) -> dict[str, Counter[str]]:
        """Returns the number of unusable samples by source and reason."""
        pairs = zip(self.sources, self.source_summaries(), strict=True)
        return {source.name: Counter(summary.dropped) for source, summary in pairs}

    def shortened(self) -> dict[str, Shortened]:
        """Returns what was cut off, by source."""
        pairs = zip(self.sources, self.source_summaries(), strict=True)
        return {source.name: Shortened(*summary.shortened) for source, summary in pairs}

    def errors(self, source: int | None = None) -> Iterator[tuple[int, SampleError]]:
        """Yields (number, error) of the bad samples of a source, or of all."""
        for number, shard in enumerate(self.shards):
            if not shard.summary.dropped or source not in (None, shard.source):
                continue
            start = int(self.starts[number])
            if shard.lost:
                detail = f"{shown(shard.location)} is not there; restore it, or build the data set again"
                bad = [(row, "missing_shard", detail) for row in range(shard.summary.num_samples)]
            else:
                bad = self.sizes(number).errors()
            for row, reason, detail in bad:
                yield start + row, SampleError(self.key(number, row), reason, detail)

    def identity(self) -> dict[str, Mapping[str, str]]:
        """Returns what the plan depends on, by source and shard: samples, index and sums of each."""
        parts: dict[str, dict[str, str]] = {source.name: {} for source in self.sources}
        for shard in self.shards:
            s = shard.summary
            text = f"{s.num_samples} samples, {s.num_usable} usable, {s.num_tokens} tokens"
            if out := shard.quarantined:
                text += f", {len(out)} quarantined ({hashlib.sha256(repr(out).encode()).hexdigest()[:8]})"
            parts[self.sources[shard.source].name][file_name(shard.location)] = f"{text}, {s.digest}"
        return parts

    def apart(self) -> Catalog:
        """Returns the same catalog with mappings of its own, for another thread."""
        return replace(self, _sizes={}, _indexes={}, _texts={})

    def _map_sizes(self, shard: int) -> Sizes:
        here = self.shards[shard]
        return Sizes(read_table(layout_path(index_stem(here.location, here.index_dir), self.layout)), here.quarantined)

    def _map_texts(self, shard: int) -> StoredTexts:
        here = self.shards[shard]
        return StoredTexts(read_table(texts_path(here.location, here.index_dir, self.layout)))

    def _map_index(self, shard: int) -> Rows:
        here = self.shards[shard]
        return Rows(
            read_table(index_path(here.location, here.index_dir)).select(["key", "members", "media", "outside"])
        )


def recall(known: dict[int, T], number: int, make: Callable[[int], T]) -> T:
    """Returns `known[number]`, made if need be; the one used longest ago is let go when there are too many."""
    value = known.pop(number) if number in known else make(number)
    known[number] = value
    if len(known) > MAX_OPEN:
        known.pop(next(iter(known)))
    return value


def add(one: Summary, other: Summary) -> Summary:
    """Returns the sums of both; the digest is the first one's."""
    return replace(
        one,
        num_samples=one.num_samples + other.num_samples,
        num_usable=one.num_usable + other.num_usable,
        num_tokens=one.num_tokens + other.num_tokens,
        num_targets=one.num_targets + other.num_targets,
        num_tiles=one.num_tiles + other.num_tiles,
        dropped=dict(Counter(one.dropped) + Counter(other.dropped)),
        shortened=tuple(a + b for a, b in zip(one.shortened, other.shortened, strict=True)),
    )
