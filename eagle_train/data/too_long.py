"""What becomes of a sample that is longer than a row: an explicit policy, decided before a pixel is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class TooLong(Protocol):
    """How much stays of a conversation that does not fit a row. Nothing is ever cut inside a turn or an image."""

    def num_answers(self, lengths: Sequence[int], max_length: int) -> int:
        """Returns how many answers stay, with all before them; 0: the sample is dropped as `too_long`.

        Args:
            lengths: tokens of the conversation up to each of its answers, media included.
            max_length: tokens of a row; the whole conversation has more.
        """


class DropTooLong:
    """The sample is dropped."""

    def num_answers(self, lengths: Sequence[int], max_length: int) -> int:
        """Returns 0."""
        del lengths, max_length
        return 0


class KeepTurns:
    """The longest run of whole turns from the start that ends with an answer and fits is kept."""

    def num_answers(self, lengths: Sequence[int], max_length: int) -> int:
        """Returns the number of answers that fit."""
        return max((count for count, length in enumerate(lengths, 1) if length <= max_length), default=0)


@dataclass(frozen=True, slots=True)
class Shortened:
    """How much of a source was cut off, by samples, turns and tokens."""

    samples: int = 0
    turns: int = 0
    tokens: int = 0
