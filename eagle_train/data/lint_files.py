"""Lint of shards and of annotation files: jobs for processes, each with the findings and hashes of its part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eagle_train.data.annotations import read_annotation
from eagle_train.data.chat import ChatTemplate, TextRun
from eagle_train.data.elsewhere import Elsewhere, SampleFiles
from eagle_train.data.images import ImageReader
from eagle_train.data.index import ensure_index, read_record, sample_key, shard_identity
from eagle_train.data.lint import Finding, TextChecks, check_texts, short, text_of
from eagle_train.data.lint_media import check_files, check_sizes, check_wishes, decode_all, media_files
from eagle_train.data.locations import Location, shown, stem
from eagle_train.data.placeholders import media_kind
from eagle_train.data.schemas import Record, parse_record
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.storage import Storage, exists, open_shard
from eagle_train.data.tables import read_table
from eagle_train.types import Media, SampleError

CHUNK = 500
"""Records of an annotation that are one job."""
LONG_TEXT = 200
"""Characters from which on the same text with other media is worth a look; short questions repeat by nature."""


@dataclass(frozen=True, kw_only=True)
class Checks:
    """All that samples are checked against.

    Args:
        texts: for turns.
        template, tokenizer: to count tokens with; None: they are not counted.
        max_length: most tokens that the text of a sample may have.
        images: how images are decoded, to see if that works; None: only headers are read.
        media_root: folder of an annotation's media.
    """

    texts: TextChecks
    template: ChatTemplate | None = None
    tokenizer: Any = None
    max_length: int | None = None
    images: ImageReader | None = None
    media_root: Path | None = None


@dataclass(slots=True)
class Part:
    """What was found in a shard or in some records of an annotation (n samples)."""

    keys: list[str] = field(default_factory=list)
    findings: list[tuple[str, Finding]] = field(default_factory=list)
    """With the key of the sample."""
    sample_hashes: list[int] = field(default_factory=list)
    """n of text and media; 0 for a sample that cannot be read."""
    text_hashes: list[int] = field(default_factory=list)
    """n of text; 0 if it is short."""
    id_hashes: list[int] = field(default_factory=list)
    """n of the id that an annotation gives; 0 if it gives none."""
    media: set[str] = field(default_factory=set)
    """Files that the records name."""

    def add(
        self, key: str, findings: Iterable[Finding] = (), *, sample: int = 0, text: int = 0, ident: int = 0
    ) -> None:
        """Adds a sample, and of each kind its first finding."""
        self.keys.append(key)
        kinds: dict[str, Finding] = {}
        for finding in findings:
            kinds.setdefault(finding.kind, finding)
        self.findings += [(key, finding) for finding in kinds.values()]
        self.sample_hashes.append(sample)
        self.text_hashes.append(text)
        self.id_hashes.append(ident)


@dataclass(frozen=True, slots=True)
class ShardWork:
    """A shard to look at.

    Args:
        number: place among all.
        source: name.
        shard, index_dir: file, and folder of its index.
        media_root: folder of files that its records may name.
        storage: how it is read; None: as by default.
    """

    number: int
    source: str
    shard: Location
    index_dir: Path | None
    media_root: Path | None = None
    storage: Storage | None = None

    def identity(self) -> str:
        """Returns what tells it from others, and from what it was before it was changed."""
        return f"{self.source} {self.shard} {self._version() if exists(self.shard, self.storage) else 'missing'}"

    def _version(self) -> str:
        if isinstance(self.shard, str):
            return shard_identity(self.shard, self.storage).decode()
        stat = self.shard.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def __str__(self) -> str:
        return shown(self.shard)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some records of an annotation to look at.

    Args:
        number: of the first one.
        records: as `read_annotation` gives them.
    """

    number: int
    records: list[bytes | Any]

    def identity(self) -> str:
        """Returns what tells it from others, and from what it was before it was changed."""
        return f"{self.number} {self.records!r}"

    def __str__(self) -> str:
        return f"record {self.number} and those after it"


def lint_shard(checks: Checks, work: ShardWork) -> Part:
    """Returns the findings of a shard."""
    source, shard, storage = work.source, work.shard, work.storage
    part, elsewhere = Part(), Elsewhere(work.media_root, (storage or Storage()).retries())
    if not exists(shard, storage):
        part.add(f"{source}/{stem(shard)}", [Finding("missing_shard", str(work))])
        return part
    try:
        index = read_table(ensure_index(shard, work.index_dir, media_root=work.media_root, storage=storage))
    except PermissionError as error:
        raise ValueError(f"the index of {work} cannot be written ({error}); give index_dir=DIR") from error
    except (ValueError, OSError) as error:
        part.add(f"{source}/{stem(shard)}", [Finding("unreadable_file", short(str(error)))])
        return part
    reader = open_shard(shard, storage)
    for row in index.to_pylist():
        lint_row(checks, part, reader, source, row, elsewhere)
    reader.close()
    return part


def lint_row(checks: Checks, part: Part, reader: ShardReader, source: str, row: dict, elsewhere: Elsewhere) -> None:
    """Adds one sample of a shard to `part`."""
    key = sample_key(source, reader.location, row["key"])
    if row["reason"] is not None:
        kind = "duplicate_key" if "key occurs twice" in row["detail"] else row["reason"]
        part.add(key, [Finding(kind, short(row["detail"]))])
        return
    members = [Member(**member) for member in row["members"]]
    try:
        record = read_record(reader, row["key"], members)
        files = SampleFiles(reader, key, row, record.media, elsewhere)
        findings = [*check_texts(record, checks.texts), *count_tokens(record, checks)]
        named = {path for ref in record.media for path in ref.paths}
        if unused := sorted(m.name for m in members if media_kind(m.name) and m.name not in named):
            findings.append(Finding("unused_media", ", ".join(unused)))
        media = [Media(**medium) for medium in row["media"]]
        findings += check_wishes(record)
        findings += check_sizes((medium.width, medium.height) for medium in media if medium.kind == "image")
        if checks.images is not None:
            findings += decode_all(media_files(media), checks.images, lambda name: files[name].read())
    except (SampleError, OSError) as error:
        reason = error.reason if isinstance(error, SampleError) else "unreadable_file"
        part.add(key, [Finding(reason, short(getattr(error, "detail", str(error))))])
        return
    # Media are the same if their files are equally long and the pictures equally large: no byte of them is read.
    told = [(files.size(m), m.width, m.height, m.start, m.end) for m in media]
    part.add(key, findings, **hashes(record, told))


def lint_records(checks: Checks, chunk: Chunk) -> Part:
    """Returns the findings of some records of an annotation."""
    part = Part()
    for number, data in enumerate(chunk.records, chunk.number):
        key, ident = f"record {number}", 0
        try:
            try:
                data = json.loads(data) if isinstance(data, bytes) else data
            except (ValueError, RecursionError) as error:
                raise SampleError(key, "bad_record", f"the line is no JSON: {error}") from error
            if isinstance(data, dict) and "id" in data:
                key, ident = f"{key}, id {short(str(data['id']))}", hashed(str(data["id"]))
            record = parse_record(data, key=key)
            part.media |= {path for ref in record.media for path in ref.paths}
            findings = [*check_texts(record, checks.texts), *count_tokens(record, checks), *check_wishes(record)]
            found, media = check_files(record, checks.media_root, checks.images, key)
            part.add(key, [*findings, *found], ident=ident, **hashes(record, media))
        except SampleError as error:
            part.add(key, [Finding(error.reason, short(error.detail))], ident=ident)
    return part


def count_tokens(record: Record, checks: Checks) -> Iterator[Finding]:
    """Yields a finding if the text alone is longer than a row."""
    if checks.template is None or checks.max_length is None:
        return
    runs = checks.template.encode(record.messages, checks.tokenizer)
    tokens = sum(len(run.ids) for run in runs if isinstance(run, TextRun))
    if tokens > checks.max_length:
        yield Finding("too_long", f"{tokens:,} tokens of text, a row has {checks.max_length:,}")


def hashes(record: Record, media: Sequence[tuple]) -> dict[str, int]:
    """Returns the hashes of a record's text, and of text and media."""
    text = repr([(m.role, m.content) for m in record.messages])
    is_long = sum(len(text_of(message)) for message in record.messages) >= LONG_TEXT
    return {"sample": hashed(text + repr(list(media))), "text": hashed(text) if is_long and media else 0}


def hashed(text: str) -> int:
    """Returns 64 bits of a text's hash, never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def chunks(path: Path, errors: list[str]) -> Iterator[Chunk]:
    """Yields an annotation's records in chunks; what is wrong with the file itself is added to `errors`."""
    first, records = 0, []
    try:
        for record in read_annotation(path):
            records.append(record)
            if len(records) == CHUNK:
                yield Chunk(first, records)
                first, records = first + CHUNK, []
    except (ValueError, OSError) as error:
        errors.append(str(error))
    if records:
        yield Chunk(first, records)


def repeated(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns places (k,) of all hashes that came before, and the place (k,) of the first one like each; 0 is none."""
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    new = np.concatenate([[True], ranked[1:] != ranked[:-1]]) if len(ranked) else np.empty(0, bool)
    firsts = order[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(ranked) else order
    again = ~new & (ranked != 0)
    return order[again], firsts[again]
