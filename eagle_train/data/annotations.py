"""Annotation files read record by record: a list of gigabytes is never whole in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20
MAX_RECORD_CHARS = 1 << 28
"""Longest record of a JSON list; what does not end within it is no JSON."""
SPACE = re.compile(r"[ \t\r\n]*")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_annotation(path: Path) -> Iterator[bytes | Any]:
    """Yields the records of an annotation: objects of a JSON list, or undecoded lines of JSON Lines.

    Raises:
        ValueError: for a list that is not whole, after the records before the defect.
    """
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(BYTE_ORDER_MARK)
        file.seek(0)
        if path.suffix.lower() != ".jsonl" and start.lstrip()[:1] == b"[":
            try:
                yield from _ListReader(file)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} is not a whole JSON list ({error}); download or export it again") from error
            return
        for line in file:
            if line.strip():
                yield line.removeprefix(BYTE_ORDER_MARK)


class _ListReader:
    """Iterates over the entries of a JSON list, with one chunk and one entry in memory.

    Args:
        file: open at the start of the list, or of the byte order mark before it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._ended = False
        self._decode_bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode_json = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[Any]:
        self._expect("[")
        if self._peek() == "]":
            self._at += 1
        else:
            yield self._entry()
            while self._expect(",]") == ",":
                yield self._entry()
        if rest := self._peek():
            raise ValueError(f"{rest!r} after the end of the list")

    def _entry(self) -> Any:
        """Returns the next entry. It is complete only before `,` or `]`: `1` may be the start of `1.5`."""
        self._peek()
        while True:
            last = self._ended or len(self._text) - self._at > MAX_RECORD_CHARS
            try:
                entry, end = self._decode_json(self._text, self._at)
            except ValueError:
                if last:
                    raise
            else:
                after = SPACE.match(self._text, end).end()
                if last or self._text[after : after + 1] in (",", "]"):
                    self._at = after
                    return entry
            self._read()

    def _expect(self, characters: str) -> str:
        """Returns the next character that is no white space, one of `characters`."""
        found = self._peek()
        if not found or found not in characters:
            raise ValueError(f"{found or 'end of the file'!r} where one of {characters!r} belongs")
        self._at += 1
        return found

    def _peek(self) -> str:
        """Returns the next character that is no white space without passing it; empty at the end of the file."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def _read(self) -> None:
        """Drops what has been passed and doubles the rest, so that a long entry is tried a few times only."""
        rest = self._text[self._at :]
        data = self._file.read(max(CHUNK_BYTES, len(rest)))
        self._ended = not data
        self._text, self._at = rest + self._decode_bytes.decode(data, final=not data), 0
