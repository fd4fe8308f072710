"""The findings of a source put together: counts by kind, a few examples of each, duplicates over all its parts."""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import normpath
from typing import Any

import numpy as np

from eagle_train.data.lint import KINDS, Finding
from eagle_train.data.lint_files import Part, hashed, repeated
from eagle_train.data.placeholders import media_kind

DUPLICATES = {
    "sample_hashes": "duplicate_sample",
    "text_hashes": "duplicate_text",
    "id_hashes": "duplicate_id",
}


def holds(numbers: np.ndarray, number: int) -> bool:
    """Returns whether a number is among some (k,) that increase."""
    place = np.searchsorted(numbers, np.uint64(number))
    return place < len(numbers) and int(numbers[place]) == number


@dataclass(slots=True)
class Found:
    """All findings of one kind."""

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    """Key and excerpt of the first ones."""


class SourceReport:
    """What was found in a source.

    Args:
        max_examples: of each kind that are kept.
    """

    def __init__(self, max_examples: int) -> None:
        self.num_samples = 0
        self.kinds: dict[str, Found] = {}
        self._max_examples = max_examples
        self._media: list[np.ndarray] = []
        self._hashes: dict[str, list[np.ndarray]] = {name: [] for name in DUPLICATES}
        self._ends: list[int] = []
        self._keys: list[bytes] = []

    def add(self, part: Part) -> None:
        """Adds what was found in a part; of each sample a few bytes are kept."""
        self.num_samples += len(part.keys)
        for key, finding in part.findings:
            self.note(key, finding)
        self._media.append(np.array([hashed(normpath(name)) for name in part.media], dtype=np.uint64))
        self._ends.append(self.num_samples)
        self._keys.append(zlib.compress(json.dumps(part.keys).encode(), 1))  # they are much alike
        for name, parts in self._hashes.items():
            parts.append(np.array(getattr(part, name), dtype=np.uint64))

    def note(self, key: str, finding: Finding, count: int = 1) -> None:
        """Counts a finding."""
        found = self.kinds.setdefault(finding.kind, Found())
        found.count += count
        if len(found.examples) < self._max_examples:
            found.examples.append((key, finding.excerpt))

    def finish(self, media_root: Path | None = None) -> None:
        """Looks for what only shows in all parts together: duplicates, and files that no record names.

        Args:
            media_root: folder to look for such files in; None: nowhere.
        """
        same = np.empty(0, np.int64)
        for name, kind in DUPLICATES.items():
            places, firsts = repeated(np.concatenate([np.empty(0, np.uint64), *self._hashes[name]]))
            if kind == "duplicate_sample":
                same = places
            elif kind == "duplicate_text":
                new = ~np.isin(places, same)
                places, firsts = places[new], firsts[new]
            shown = np.argsort(places)[: self._max_examples]
            for place, first in zip(places[shown].tolist(), firsts[shown].tolist(), strict=True):
                self.note(self._key(place), Finding(kind, f"like {self._key(first)}"))
            if rest := len(places) - len(shown):
                self.kinds[kind].count += rest
        if media_root is not None:
            for name in self._unused(media_root):
                self.note(name, Finding("unused_media", f"in {media_root}"))

    def _key(self, place: int) -> str:
        """Returns the key of a sample by its place among all."""
        part = bisect_right(self._ends, place)
        return json.loads(zlib.decompress(self._keys[part]))[place - self._ends[part]]  # counted from its end

    def _unused(self, folder: Path) -> Iterable[str]:
        """Yields the images and videos in a folder that no record names."""
        named = np.unique(np.concatenate([np.empty(0, np.uint64), *self._media]))
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if media_kind(name) and not holds(named, hashed(name)) and path.is_file():
                yield name

    def count(self, is_error: bool) -> int:
        """Returns the number of errors, or of warnings."""
        return sum(found.count for kind, found in self.kinds.items() if KINDS[kind].is_error == is_error)

    def describe(self) -> dict[str, Any]:
        """Returns it all as plain values."""
        return {
            "samples": self.num_samples,
            "errors": self.count(True),
            "warnings": self.count(False),
            "findings": {
                kind: {
                    "level": "error" if KINDS[kind].is_error else "warning",
                    "count": found.count,
                    "remedy": KINDS[kind].remedy,
                    "examples": [{"key": key, "excerpt": excerpt} for key, excerpt in found.examples],
                }
                for kind, found in sorted(self.kinds.items(), key=lambda pair: (not KINDS[pair[0]].is_error, pair[0]))
            },
        }
