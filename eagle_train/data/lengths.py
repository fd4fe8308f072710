"""The tokens of a shard's conversations under one tokenizer and template, counted up to each of their answers.

A file beside the index, named by the fingerprint of both. Where index and lengths are missing both, one pass over the
shard makes both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path

import pyarrow as pa

from eagle_train.data.answers import AnswerCounter, AnswerEnd, TokenizedText
from eagle_train.data.chat import ChatTemplate
from eagle_train.data.index import (
    INDEX_VERSION,
    ensure_index,
    identity,
    index_path,
    index_stem,
    is_current,
    read_records,
)
from eagle_train.data.locations import Location
from eagle_train.data.schemas import Record
from eagle_train.data.storage import Storage
from eagle_train.data.tables import read_made, write_table
from eagle_train.data.text_tokens import NO_TOKENS, to_columns
from eagle_train.types import Message

LENGTHS_VERSION = f"{INDEX_VERSION}.5"
"""A row is a row of the index."""
BATCH_CHARACTERS = 1 << 18
COLUMNS = tuple(item.name for item in fields(AnswerEnd))


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """What text lengths depend on; can be sent to other processes.

    Args:
        template: the strings around turns.
        tokenizer: a fast transformers tokenizer.
        fingerprint: names the two, in the names of files.
    """

    template: ChatTemplate
    tokenizer: object
    fingerprint: str


def lengths_path(shard: Location, index_dir: Path | None, fingerprint: str) -> Path:
    """Returns where the text lengths of `shard` under one tokenizer and template are."""
    return Path(f"{index_stem(shard, index_dir)}.text-{fingerprint}.arrow")


def ensure_lengths(
    shard: Location,
    index_dir: Path | None,
    text: TextLayout,
    media_root: Path | None = None,
    storage: Storage | None = None,
) -> Path:
    """Builds the text lengths of `shard`, and its index, unless they are there; returns the path of the lengths.

    The table has a row per row of the index, and list<int32> columns, an entry per answer: `num_tokens`,
    `num_targets` and `num_media` as in `AnswerEnd`; and the columns of `text_tokens`. Bad samples have none. The
    metadata hold a `digest` of it all.

    Args:
        media_root, storage: see `ensure_index`.
    """
    path = lengths_path(shard, index_dir, text.fingerprint)
    if has_lengths(shard, index_dir, text.fingerprint, media_root, storage):
        return path
    made_of = of_lengths(identity(shard, media_root, storage))
    collected = Lengths(text)
    ensure_index(shard, index_dir, collected.add, media_root, storage)
    if not collected.rows:  # the index was there
        make = partial(ensure_index, shard, index_dir, media_root=media_root, storage=storage)
        for record in read_records(shard, read_made(make), storage):
            collected.add(record)
    table = collected.table()
    write_table(table.replace_schema_metadata(made_of | table.schema.metadata), path)
    return path


def has_lengths(
    shard: Location,
    index_dir: Path | None,
    fingerprint: str,
    media_root: Path | None = None,
    storage: Storage | None = None,
) -> bool:
    """Returns whether index and text lengths of `shard` are there and fit it as it is now."""
    made_of = cache(partial(identity, shard, media_root, storage))
    path = lengths_path(shard, index_dir, fingerprint)
    return is_current(index_path(shard, index_dir), made_of) and is_current(path, lambda: of_lengths(made_of()))


def of_lengths(made_of: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Returns the metadata that tie text lengths to their shard, from those of its index: rows are the index's."""
    return {**made_of, b"version": LENGTHS_VERSION.encode()}


def read_lengths(table: pa.Table) -> list[list[AnswerEnd]]:
    """Returns the rows of a table of `ensure_lengths` as objects."""
    columns = [table[name].to_pylist() for name in COLUMNS]
    return [list(map(AnswerEnd, *row)) for row in zip(*columns, strict=True)]


class Lengths:
    """Collects the texts of records, row by row; tokenizes them in batches."""

    def __init__(self, text: TextLayout) -> None:
        self._counter = AnswerCounter(text.template, text.tokenizer)
        self._waiting: list[Sequence[Message]] = []
        self._characters = 0
        self.rows: list[TokenizedText] = []
        """Of all records given so far; those that wait are empty."""
        self._places: list[int] = []

    def add(self, record: Record | None) -> None:
        """Adds a row; None is a bad sample."""
        if record is not None:
            self._waiting.append(record.messages)
            self._places.append(len(self.rows))
            self._characters += sum(len(part) for m in record.messages for part in m.content if isinstance(part, str))
        self.rows.append(NO_TEXT)
        if self._characters >= BATCH_CHARACTERS:
            self._tokenize()

    def _tokenize(self) -> None:
        for place, text in zip(self._places, self._counter.tokenize(self._waiting), strict=True):
            self.rows[place] = text
        self._waiting, self._places, self._characters = [], [], 0

    def table(self) -> pa.Table:
        """Returns what was found of all rows."""
        if self._waiting:
            self._tokenize()
        ends = {name: [[getattr(end, name) for end in row.ends] for row in self.rows] for name in COLUMNS}
        columns = {name: pa.array(column, pa.list_(pa.int32())) for name, column in ends.items()}
        columns |= to_columns([row.tokens for row in self.rows])
        digest = hashlib.sha256()
        for column in columns.values():
            digest.update(column.offsets.to_numpy().tobytes() + column.values.to_numpy().tobytes())
        return pa.table(columns).replace_schema_metadata({b"digest": digest.hexdigest()[:32].encode()})


NO_TEXT = TokenizedText([], NO_TOKENS)
"""Of a bad sample."""
