"""The findings of a source put together: counts by kind, a few examples of each, duplicates over all its parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eagle_train.data.lint import KINDS, Finding
from eagle_train.data.lint_files import Part, repeated
from eagle_train.data.placeholders import media_kind

DUPLICATES = {
    "sample_hashes": "duplicate_sample",
    "text_hashes": "duplicate_text",
    "id_hashes": "duplicate_id",
}


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
        self._media: set[str] = set()
        self._hashes: dict[str, list[np.ndarray]] = {name: [] for name in DUPLICATES}
        self._keys: list[Sequence[str]] = []

    def add(self, part: Part) -> None:
        """Adds what was found in a part; parts come in any order."""
        self.num_samples += len(part.keys)
        for key, finding in part.findings:
            self.note(key, finding)
        self._media |= part.media
        self._keys.append(part.keys)
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
        names = [key for keys in self._keys for key in keys]
        same: set[int] = set()
        for name, kind in DUPLICATES.items():
            hashes = np.concatenate([np.empty(0, np.uint64), *self._hashes[name]])
            places, firsts = repeated(hashes)
            pairs = [(p, f) for p, f in zip(places.tolist(), firsts.tolist(), strict=True)]
            if kind == "duplicate_sample":
                same = {place for place, _ in pairs}
            elif kind == "duplicate_text":
                pairs = [pair for pair in pairs if pair[0] not in same]
            for place, first in sorted(pairs):
                self.note(names[place], Finding(kind, f"like {names[first]}"))
        if media_root is not None:
            for name in self._unused(media_root):
                self.note(name, Finding("unused_media", f"in {media_root}"))

    def _unused(self, folder: Path) -> Iterable[str]:
        """Yields the images and videos in a folder that no record names."""
        named = {str(Path(name)) for name in self._media}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if media_kind(name) and name not in named and path.is_file():
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
