"""All samples of a stage's sources, as arrays: where they are and how many tokens they take."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.encode import Encoder
from eagle_train.data.index import SCHEMA, ensure_index, ensure_lengths, sample_key
from eagle_train.data.shards import expected_shards
from eagle_train.types import Media, SampleError


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of a mix.

    Args:
        name: as in reports and errors.
        shards: paths of its tars, sorted.
        repeat: passes over it per epoch; 0.5 takes a seeded half.
        index_dir: where its indexes are; None: beside the shards.
    """

    name: str
    shards: Sequence[Path]
    repeat: float = 1.0
    index_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The samples of all sources; a sample's number is its place in these arrays (n samples)."""

    sources: Sequence[Source]
    shards: Sequence[Path]
    source_ids: np.ndarray
    """(n,) int32 into `sources`."""
    shard_ids: np.ndarray
    """(n,) int32 into `shards`."""
    rows: np.ndarray
    """(n,) int32, row in the shard's index."""
    lengths: np.ndarray
    """(n,) int32, tokens of the sample; 0 for a bad one."""
    num_tiles: np.ndarray
    """(n,) int32."""
    errors: dict[int, SampleError]
    """Bad samples, by number."""
    fingerprint: str
    """Hash of the data: names, keys and lengths."""
    tables: list[pa.Table] = field(repr=False)
    """Index of each shard."""

    def __len__(self) -> int:
        return len(self.lengths)

    def source_sizes(self) -> list[int]:
        """Returns the number of samples of each source, bad ones included."""
        return np.bincount(self.source_ids, minlength=len(self.sources)).tolist()

    def index_row(self, number: int) -> dict:
        """Returns the index row of a sample, see `index.SCHEMA`."""
        return self.tables[self.shard_ids[number]].slice(self.rows[number], 1).to_pylist()[0]

    def dropped(self) -> dict[str, Counter[str]]:
        """Returns the number of bad samples by source and reason."""
        counts = {source.name: Counter() for source in self.sources}
        for number, error in self.errors.items():
            counts[self.sources[self.source_ids[number]].name][error.reason] += 1
        return counts


def build_catalog(
    sources: Sequence[Source],
    encoder: Encoder,
    *,
    max_length: int,
    text_fingerprint: str,
    max_bad_share: float = 0.01,
) -> Catalog:
    """Reads (building what is missing) the indexes and text lengths of all sources.

    Args:
        max_length: tokens of a row; longer samples are bad (`too_long`).
        text_fingerprint: names the tokenizer and template, see `index.lengths_path`.
        max_bad_share: largest share of a source that may be bad.

    Raises:
        TooManyBadSamples: with the list.
    """
    digest = hashlib.sha256()
    shards, tables, columns, errors = [], [], [], {}
    start = 0
    for source_id, source in enumerate(sources):
        first = start
        for shard in source.shards:
            table, lengths, tiles, bad = read_shard(source, shard, encoder, text_fingerprint, max_length)
            n = len(lengths)
            columns.append((np.full(n, source_id), np.full(n, len(shards)), np.arange(n), lengths, tiles))
            errors |= {start + row: error for row, error in bad.items()}
            digest.update(json.dumps([source.name, shard.name, table["key"].to_pylist()]).encode())
            digest.update(lengths.tobytes())
            shards.append(shard)
            tables.append(table)
            start += n
        bad_here = [error for number, error in errors.items() if number >= first]
        if len(bad_here) > max_bad_share * (start - first):
            raise TooManyBadSamples(source.name, bad_here, start - first, max_bad_share)
    arrays = [np.concatenate(column).astype(np.int32) for column in zip(*columns, strict=True)]
    return Catalog(
        sources=sources,
        shards=shards,
        source_ids=arrays[0],
        shard_ids=arrays[1],
        rows=arrays[2],
        lengths=arrays[3],
        num_tiles=arrays[4],
        errors=errors,
        fingerprint=digest.hexdigest(),
        tables=tables,
    )


def read_shard(source: Source, shard: Path, encoder: Encoder, text_fingerprint: str, max_length: int):
    """Returns a shard's index, total lengths (n,), tiles (n,) and bad samples by row."""
    if not shard.exists():
        return lost_shard(source, shard)
    text = ensure_lengths(shard, source.index_dir, text_fingerprint, encoder.text_length)
    table = pq.read_table(ensure_index(shard, source.index_dir))
    lengths = text[:, 0].astype(np.int32)
    tiles = np.zeros(len(lengths), dtype=np.int32)
    bad = {}
    for row, (media, reason, detail) in enumerate(
        zip(table["media"].to_pylist(), table["reason"].to_pylist(), table["detail"].to_pylist(), strict=True)
    ):
        for medium in media:
            tiles[row] += encoder.plan_media(Media(**medium)).num_tiles
            lengths[row] += encoder.media_length(Media(**medium))
        if reason is None and text[row, 1] == 0:
            reason, detail = "no_answer", "no token of an answer is supervised under this template"
        if reason is None and lengths[row] > max_length:
            reason = "too_long"
            detail = f"{lengths[row]} tokens, a row has {max_length}; raise max_length or drop it"
        if reason is not None:
            key = sample_key(source.name, shard, table["key"][row].as_py())
            bad[row] = SampleError(key, reason, detail)
            lengths[row] = tiles[row] = 0
    return table, lengths, tiles, bad


def lost_shard(source: Source, shard: Path):
    """Returns what `read_shard` does for a shard that is not there: every sample it held is bad."""
    count = expected_shards(shard.parent).get(shard.name, 1)
    keys = [f"sample {row} of {count}" for row in range(count)]
    table = pa.table({f.name: keys if f.name == "key" else pa.nulls(count, f.type) for f in SCHEMA})
    detail = f"{shard} is not there; restore it, or build the data set again"
    bad = {row: SampleError(sample_key(source.name, shard, keys[row]), "missing_shard", detail) for row in range(count)}
    return table, np.zeros(count, dtype=np.int32), np.zeros(count, dtype=np.int32), bad
