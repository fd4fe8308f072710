"""Where the tokens of a text stand among its characters; tokens are in the order of their characters.

Looked up around a place: to take all offsets out of an encoding costs four times as much as a conversation's look-ups.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding


class PlacedTokens:
    """The tokens of a text that stand, end to end, for its bytes; `Spelling` makes them.

    Args:
        ids: (n,) int64 of the tokens.
        ends: bytes of the text up to the end of each; some tokens may have none.
        text: the text.
        written: it in UTF-8.
    """

    def __init__(self, ids: np.ndarray, ends: Sequence[int], text: str, written: bytes) -> None:
        self.ids = ids
        self._ends = ends
        self._text, self._written = text, written
        self._is_ascii = len(text) == len(written)

    def __len__(self) -> int:
        return len(self._ends)

    def num_begun(self, place: int) -> int:
        """Returns how many tokens start before the character at `place`."""
        return min(len(self), bisect_left(self._ends, self._byte(place)) + 1) if place else 0

    def num_ended(self, place: int) -> int:
        """Returns how many tokens end before the character at `place`; one without bytes covers that it stands at."""
        byte = self._byte(place)
        number = bisect_right(self._ends, byte)
        while number and self._ends[number - 1] == byte == (self._ends[number - 2] if number > 1 else 0):
            number -= 1
        return number

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """Returns the characters [start, end) that a token has some bytes of; that it stands at, if it has none."""
        start, end = self._ends[token - 1] if token else 0, self._ends[token]
        end = max(end, start + 1)
        if self._is_ascii:
            return start, end
        first = [len(self._written[:byte].decode(errors="ignore")) for byte in (start, end - 1)]
        return first[0], first[1] + 1

    def _byte(self, place: int) -> int:
        """Returns where the character at `place` begins."""
        return place if self._is_ascii else len(self._text[:place].encode())


Tokens = Encoding | PlacedTokens


def num_begun(encoding: Tokens, place: int) -> int:
    """Returns how many tokens start before the character at `place`."""
    if isinstance(encoding, PlacedTokens):
        return encoding.num_begun(place)
    num_tokens = len(encoding)
    if not num_tokens or encoding.token_to_chars(num_tokens - 1)[0] < place:
        return num_tokens
    number = encoding.char_to_token(place)
    if number is None:  # in no token: a space that was stripped
        return bisect_left(range(num_tokens), place, key=lambda index: encoding.token_to_chars(index)[0])
    # Several tokens may share characters, such as the bytes of one.
    while number < num_tokens and encoding.token_to_chars(number)[0] < place:
        number += 1
    while number and encoding.token_to_chars(number - 1)[0] >= place:
        number -= 1
    return number


def num_ended(encoding: Tokens, place: int) -> int:
    """Returns how many tokens end before the character at `place`; a token of no width covers the one it stands at."""
    if isinstance(encoding, PlacedTokens):
        return encoding.num_ended(place)
    number = num_begun(encoding, place)
    while number:
        start, end = encoding.token_to_chars(number - 1)
        if max(end, start + 1) <= place:
            break
        number -= 1
    return number
