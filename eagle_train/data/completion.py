"""Completion: rows made one after the other, each as full as can be before the next. For few samples to a row."""

from __future__ import annotations

import numpy as np

NEAR = 4
"""Two samples are preferred to one that leaves more room if they leave less than so many tokens."""


def complete_rows(lengths: np.ndarray, capacity: int, enough: int) -> tuple[list[int], list[int]]:
    """Returns the row of each sample, and the tokens left in each row.

    A row begins with the longest sample left. While one more fits, it gets the longest that does, if that leaves no
    more than `enough`: so the short ones remain for rows that need them. Or else it gets the two that fill it, to
    `NEAR`; they are as alike as can be, so that long ones find short ones later. Or else the longest after all.

    Args:
        lengths: (n,) int64 tokens of the samples, descending, in 1..capacity.
        capacity: tokens of a row.
        enough: tokens that a row may have left for one sample to be preferred to two that fill it.

    Source: minimum bin slack (J. N. D. Gupta and J. C. Ho, 1999), with at most two samples at a time.
    """
    # A set of lengths is one integer, of a bit each. Loops stay in one function: calls would double its time.
    table = np.bincount(lengths, minlength=capacity + 1)
    counts, there, mirrored = table.tolist(), as_bits(table), as_bits(table[::-1])
    first = np.searchsorted(-lengths, -np.arange(capacity + 1)).tolist()  # sample of each length
    shortest = int(lengths[-1]) if len(lengths) else 0
    places, room = [0] * len(lengths), []
    while there:
        row, left, chosen = len(room), capacity, (there.bit_length() - 1,)
        while chosen:
            for length in chosen:
                left -= length
                counts[length] = others = counts[length] - 1
                places[first[length] + others] = row
                if not others:
                    there ^= 1 << length
                    mirrored ^= 1 << capacity - length
            if left < shortest:
                break
            if counts[left]:
                chosen = (left,)
                continue
            longest = (there & (2 << left) - 1).bit_length() - 1
            chosen = (longest,) if longest > 0 else ()
            if chosen and left - longest > enough and left >= 2 * shortest:
                for total in range(left, max(longest, left - NEAR), -1):
                    # Bit `capacity - length` of `mirrored`, shifted, is bit `total - length`.
                    found = there & mirrored >> capacity - total
                    if found and (pair := most_alike(found, total, counts)):
                        chosen = pair
                        break
        room.append(left)
    return places, room


def most_alike(found: int, total: int, counts: list[int]) -> tuple[int, ...]:
    """Returns the two lengths out of pairs of the same total that differ least, () if there is no pair.

    Args:
        found: set of the lengths whose complement to the total is there too, as bits.
        total: of the two.
        counts: samples of each length.
    """
    half = (total + 1) // 2
    found >>= half
    if total == 2 * half and found & 1 and counts[half] < 2:
        found ^= 1  # one sample is no pair
    if not found:
        return ()
    longer = half + (found & -found).bit_length() - 1
    return longer, total - longer


def as_bits(counts: np.ndarray) -> int:
    """Returns the set of the places at which counts are not zero, as bits of an integer."""
    return int.from_bytes(np.packbits(counts > 0, bitorder="little").tobytes(), "little")
