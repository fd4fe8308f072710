"""One annotation of many sources becomes pieces of one source each, a piece for every shard to come."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from eagle_train.data.annotations import read_annotation
from eagle_train.data.archives import clean_name
from eagle_train.data.media_fields import NO_MEDIA

SPLIT, RECORDS = "split.json", "records"
NOTED_FOLDERS = 20


@dataclass(frozen=True, slots=True)
class Part:
    """What an annotation holds of one source."""

    num_records: int
    folders: Mapping[str, int]
    """Records by the folder of their image, the most frequent ones; no image is an empty name."""


class Selector:
    """Decides which source a record belongs to: the first one whose globs it matches.

    Matching ignores case. A record's `image` is taken as an absolute path (`/coco/train2017/1.jpg`, so that
    `*/coco/*` means a folder anywhere), and as an empty text if it has none; other fields are taken as texts.

    Args:
        select: by source, in order: globs by field, of which every field must match one; None takes any record.
    """

    def __init__(self, select: Mapping[str, Mapping[str, Sequence[str]] | None]) -> None:
        self._rules = [
            (name, [(field, _any_of(globs)) for field, globs in (fields or {}).items()])
            for name, fields in select.items()
        ]

    def source_of(self, record: Any) -> str | None:
        """Returns the name of the source, or None if no rule matches."""
        fields = record if isinstance(record, dict) else {}
        image = image_of(record)
        values = {**fields, "image": f"/{image}" if image else ""}
        for name, rules in self._rules:
            if all(rule.match(str(values.get(field, ""))) for field, rule in rules):
                return name
        return None


def _any_of(globs: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(glob) for glob in globs), re.IGNORECASE)


def image_of(record: Any) -> str:
    """Returns the path of a record's first image, empty if it has none in any of the spellings of that."""
    if not isinstance(record, dict):
        return ""
    value = record.get("image") or record.get("images")
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str) or first.strip().lower() in NO_MEDIA:
        return ""
    return clean_name(first)


def split_annotation(
    annotation: Path,
    selector: Selector,
    folder: Path,
    *,
    sources: Sequence[str],
    records_per_piece: int,
    progress: Callable[[int], None],
) -> dict[str, Part]:
    """Writes the records of each source as files `<folder>/<source>/<piece>.jsonl`; returns what each has.

    A line is the record's position in the annotation, from 0, and its JSON: `00000012 {...}`.

    Args:
        annotation: a JSON list or JSON Lines.
        folder: created.
        sources: all names that `selector` gives.
        progress: called with the number of records just read.

    Raises:
        ValueError: for records that no source takes, with their number by folder of the image.
    """
    writers = {name: PieceWriter(folder / name, records_per_piece) for name in sources}
    lost: Counter[str] = Counter()
    with ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        for position, data in enumerate(read_annotation(annotation)):
            record, line = _decode(data)
            name = selector.source_of(record)
            image_folder = image_of(record).rpartition("/")[0]
            if name is None:
                lost[image_folder] += 1
            else:
                writers[name].write(f"{position:08d}", line, image_folder)
            progress(1)
    if lost:
        found = ", ".join(f"{n} in {where or 'no image'}" for where, n in lost.most_common(NOTED_FOLDERS))
        raise ValueError(
            f"{lost.total()} records of {annotation} belong to no source: {found}; add their folders to `select` of a "
            "card, or add a source whose card has no `select`: it takes the rest"
        )
    return {name: writer.part() for name, writer in writers.items()}


def _decode(data: bytes | Any) -> tuple[Any, bytes]:
    """Returns a record and its JSON in one line; what is no JSON is an empty record that stays as it is."""
    if not isinstance(data, bytes):
        return data, json.dumps(data).encode()
    line = data.strip()
    try:
        return json.loads(line), line
    except (ValueError, RecursionError):
        return {}, line


class PieceWriter:
    """Writes the records of one source into files of a fixed number of records."""

    def __init__(self, folder: Path, records_per_piece: int) -> None:
        folder.mkdir(parents=True)
        self._folder, self._records_per_piece = folder, records_per_piece
        self._count = 0
        self._folders: Counter[str] = Counter()
        self._file: BinaryIO | None = None

    def write(self, key: str, line: bytes, image_folder: str = "") -> None:
        """Adds a record: its key, and its JSON in one line."""
        piece, place = divmod(self._count, self._records_per_piece)
        if place == 0:
            self.close()
            self._file = (self._folder / f"{piece:06d}.jsonl").open("wb")
        self._file.write(b"%s %s\n" % (key.encode(), line))
        self._count += 1
        self._folders[image_folder] += 1

    def close(self) -> None:
        """Closes the open file."""
        if self._file is not None:
            self._file.close()

    def part(self) -> Part:
        """Returns what was written."""
        return Part(self._count, dict(self._folders.most_common(NOTED_FOLDERS)))


def ensure_split(work: Path, split: Callable[[], Mapping[str, Part]]) -> dict[str, Part]:
    """Returns what `split` wrote into `<work>/records`; it is called unless that was done."""
    done = work / SPLIT
    if done.is_file():
        return {name: Part(**part) for name, part in json.loads(done.read_text()).items()}
    shutil.rmtree(work / RECORDS, ignore_errors=True)
    parts = split()
    aside = done.with_suffix(".partial")
    aside.write_text(json.dumps({name: asdict(part) for name, part in parts.items()}))
    aside.replace(done)
    return dict(parts)


def read_pieces(folder: Path) -> list[Path]:
    """Returns the piece files of one source, in order."""
    return sorted(folder.glob("*.jsonl"))


def read_piece(piece: Path) -> list[tuple[str, bytes]]:
    """Returns the key and the undecoded JSON of the records of a piece."""
    lines = piece.read_bytes().rstrip(b"\n").split(b"\n")
    return [(key.decode(), line) for key, _, line in (entry.partition(b" ") for entry in lines)]
