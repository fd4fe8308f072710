"""All samples of a stage's sources, as arrays: where they are and how many tokens they take."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from eagle_train.data.answers import AnswerEnd
from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.encode import Encoder
from eagle_train.data.index import SCHEMA, ensure_index, sample_key
from eagle_train.data.lengths import TextLayout, ensure_lengths, read_lengths
from eagle_train.data.media import MediaError
from eagle_train.data.shards import expected_shards
from eagle_train.data.tables import read_made
from eagle_train.data.too_long import Cut, Shortened, TooLong
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
    cuts: dict[int, Cut]
    """Shortened samples, by number; `lengths` and `num_tiles` are those of what stays."""
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

    def shortened(self) -> dict[str, Shortened]:
        """Returns what was cut off, by source."""
        sums = {source.name: Shortened() for source in self.sources}
        for number, cut in self.cuts.items():
            name = self.sources[self.source_ids[number]].name
            sums[name] = sums[name].plus(cut)
        return sums


@dataclass(frozen=True)
class ShardSamples:
    """The n samples of one shard."""

    table: pa.Table
    """Its index."""
    lengths: np.ndarray
    """(n,) int32, as in `Catalog`."""
    num_tiles: np.ndarray
    """(n,) int32."""
    errors: dict[int, SampleError]
    """By row."""
    cuts: dict[int, Cut]
    """By row."""


def build_catalog(
    sources: Sequence[Source],
    encoder: Encoder,
    *,
    max_length: int,
    too_long: TooLong,
    text_fingerprint: str,
    max_bad_share: float = 0.01,
) -> Catalog:
    """Reads (building what is missing) the indexes and text lengths of all sources.

    Args:
        max_length: tokens of a row.
        too_long: what becomes of longer samples.
        text_fingerprint: names the tokenizer and template, see `lengths.lengths_path`.
        max_bad_share: largest share of a source that may be bad.

    Raises:
        TooManyBadSamples: with the list.
    """
    digest = hashlib.sha256()
    shards, tables, columns, errors, cuts = [], [], [], {}, {}
    start = 0
    for source_id, source in enumerate(sources):
        first = start
        for shard in source.shards:
            here = read_shard(source, shard, encoder, text_fingerprint, max_length, too_long)
            n = len(here.lengths)
            places = np.full(n, source_id), np.full(n, len(shards)), np.arange(n)
            columns.append((*places, here.lengths, here.num_tiles))
            errors |= {start + row: error for row, error in here.errors.items()}
            cuts |= {start + row: cut for row, cut in here.cuts.items()}
            digest.update(json.dumps([source.name, shard.name, here.table["key"].to_pylist()]).encode())
            digest.update(here.lengths.tobytes())
            shards.append(shard)
            tables.append(here.table)
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
        cuts=cuts,
        fingerprint=digest.hexdigest(),
        tables=tables,
    )


def read_shard(
    source: Source, shard: Path, encoder: Encoder, text_fingerprint: str, max_length: int, too_long: TooLong
) -> ShardSamples:
    """Returns the samples of a shard."""
    if not shard.exists():
        return lost_shard(source, shard)
    text = TextLayout(template=encoder.template, tokenizer=encoder.tokenizer, fingerprint=text_fingerprint)
    texts = read_lengths(read_made(partial(ensure_lengths, shard, source.index_dir, text)))
    table = read_made(partial(ensure_index, shard, source.index_dir))
    here = ShardSamples(table, np.zeros(len(texts), np.int32), np.zeros(len(texts), np.int32), {}, {})
    columns = (table[name].to_pylist() for name in ("key", "media", "reason", "detail"))
    for row, (ends, key, media, reason, detail) in enumerate(zip(texts, *columns, strict=True)):
        key = sample_key(source.name, shard, key)
        if reason is not None:
            here.errors[row] = SampleError(key, reason, detail)
            continue
        try:
            facts = [Media(**medium) for medium in media]
            here.lengths[row], here.num_tiles[row], cut = fit_sample(key, ends, facts, encoder, max_length, too_long)
        except SampleError as error:
            here.errors[row] = error
            continue
        except MediaError as error:  # larger than the run's policy allows
            here.errors[row] = SampleError(key, error.reason, error.detail)
            continue
        if cut is not None:
            here.cuts[row] = cut
    return here


def fit_sample(
    key: str, ends: Sequence[AnswerEnd], media: Sequence[Media], encoder: Encoder, max_length: int, too_long: TooLong
) -> tuple[int, int, Cut | None]:
    """Returns the tokens and tiles of a sample that is made to fit a row, and what was cut off, if anything.

    Raises:
        SampleError: `too_long` or `no_answer`, if nothing of it can be trained on.
    """
    before = [0, *accumulate(encoder.media_length(medium) for medium in media)]
    lengths = [end.num_tokens + before[end.num_media] for end in ends]
    stay = len(ends) if lengths[-1] <= max_length else too_long.num_answers(lengths, max_length)
    if stay == 0:
        detail = f"{lengths[-1]} tokens, {lengths[0]} up to the first answer, a row has {max_length}"
        raise SampleError(key, "too_long", f"{detail}; raise max_length, or see data.too_long")
    end, length = ends[stay - 1], lengths[stay - 1]
    if end.num_targets == 0:
        raise SampleError(key, "no_answer", "no token of an answer is supervised under this template")
    num_tiles = sum(encoder.plan_media(medium).num_tiles for medium in media[: end.num_media])
    lost = len(ends) - stay  # each an answer with its question
    return length, num_tiles, Cut(stay, 2 * lost, lengths[-1] - length) if lost else None


def lost_shard(source: Source, shard: Path) -> ShardSamples:
    """Returns what `read_shard` does for a shard that is not there: every sample it held is bad."""
    count = expected_shards(shard.parent).get(shard.name, 1)
    keys = [f"sample {row} of {count}" for row in range(count)]
    table = pa.table({f.name: keys if f.name == "key" else pa.nulls(count, f.type) for f in SCHEMA})
    detail = f"{shard} is not there; restore it, or build the data set again"
    bad = {row: SampleError(sample_key(source.name, shard, keys[row]), "missing_shard", detail) for row in range(count)}
    return ShardSamples(table, np.zeros(count, np.int32), np.zeros(count, np.int32), bad, {})
