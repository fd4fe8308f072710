"""The tokens of conversations as the pass that counts them found them, kept so that no worker tokenizes again.

They take four bytes each, about a hundredth of what the media of an image data set take, and are mapped, not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from eagle_train.data.chat import TextRun

COLUMNS = ("ids", "run_ends", "targets")


@dataclass(frozen=True, eq=False, slots=True)
class TextTokens:
    """The text of one conversation; between two runs stands a medium, in reading order."""

    ids: np.ndarray
    """(n,) int32, the runs end to end, the start of the conversation in the first."""
    run_ends: np.ndarray
    """(r,) int32: tokens up to the end of each run."""
    targets: np.ndarray
    """(2k,) int32: the first token, and the one behind the last, of each stretch of targets."""

    def items(self) -> list[TextRun | int]:
        """Returns what `ChatTemplate.encode` gives, with the start in the first run."""
        ids, is_target = self.ids.astype(np.int64), np.zeros(len(self.ids), dtype=bool)
        bounds = self.targets.tolist()
        for first, end in zip(bounds[::2], bounds[1::2], strict=True):
            is_target[first:end] = True
        items: list[TextRun | int] = []
        start = 0
        for number, end in enumerate(self.run_ends.tolist()):
            items += [TextRun(ids[start:end], is_target[start:end]), number]
            start = end
        return items[:-1]


NO_TOKENS = TextTokens(*[np.empty(0, dtype=np.int32)] * 3)
"""Of a bad sample."""


def to_columns(texts: Sequence[TextTokens]) -> dict[str, pa.Array]:
    """Returns list<int32> columns, a row per text."""
    return {name: lists_of([getattr(text, name) for text in texts]) for name in COLUMNS}


def lists_of(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Returns a list<int32> column of (n,) int32 arrays, a row each.

    Raises:
        ValueError: if they hold more than 2^31 - 1 numbers together.
    """
    offsets = np.cumsum([0, *map(len, arrays)])
    if offsets[-1] > (most := np.iinfo(np.int32).max):
        raise ValueError(f"a shard with {offsets[-1]} tokens of text; at most {most} fit its index: make it smaller")
    values = np.concatenate([np.empty(0, dtype=np.int32), *arrays])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


class StoredTexts:
    """The texts of a shard, mapped.

    Args:
        table: of `lengths.ensure_lengths`.
    """

    def __init__(self, table: pa.Table) -> None:
        lists = [table[name].combine_chunks() for name in COLUMNS]
        self._columns = [(column.offsets.to_numpy(), column.values.to_numpy()) for column in lists]

    def __getitem__(self, row: int) -> TextTokens:
        return TextTokens(*(values[offsets[row] : offsets[row + 1]] for offsets, values in self._columns))
