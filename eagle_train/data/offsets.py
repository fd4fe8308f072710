"""Where the tokens of a text stand among its characters; tokens are in the order of their characters.

Looked up around a place: to take all offsets out of an encoding costs four times as much as a conversation's look-ups.
"""

from __future__ import annotations

from bisect import bisect_left

from tokenizers import Encoding


def num_begun(encoding: Encoding, place: int) -> int:
    """Returns how many tokens start before the character at `place`."""
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


def num_ended(encoding: Encoding, place: int) -> int:
    """Returns how many tokens end before the character at `place`; a token of no width covers the one it stands at."""
    number = num_begun(encoding, place)
    while number:
        start, end = encoding.token_to_chars(number - 1)
        if max(end, start + 1) <= place:
            break
        number -= 1
    return number
