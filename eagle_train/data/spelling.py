"""Where the tokens of a text stand, told by how each of them is spelled.

To keep track of places costs a tokenizer a fifth of its time. They need not be kept where the spellings of the tokens,
end to end, are the text: then each token stands for the bytes that it is spelled with.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from eagle_train.data.chat import backend_of
from eagle_train.data.offsets import PlacedTokens
from eagle_train.data.tokenizer.tiktoken import byte_characters

UNKNOWN = b"\xff"
"""Of numbers that no token has: no text has this byte."""
PROBE = "  A probe:\tits  tokens'\n\n 12345, (end) of\r\nall été 日本🙂  \n "
"""Spaces of all kinds, at both ends too: there tokenizers differ in what they say a token covers."""

Prefixed = Literal["nowhere", "in_front", "behind_added"]


class Spelling:
    """How the tokens of a vocabulary are spelled.

    Args:
        spelled: bytes of each token, by its number.
        added: numbers of the added tokens.
        prefixed: where the tokenizer puts a space that is no part of the text: in front, or behind each added token
            too, as sentencepiece's do.
    """

    def __init__(self, spelled: Mapping[int, bytes], added: frozenset[int], prefixed: Prefixed) -> None:
        size = max(spelled, default=-1) + 1
        pieces = [spelled.get(number, UNKNOWN) for number in range(size)]
        self._lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._bytes = np.frombuffer(b"".join(pieces), np.uint8)
        self._is_added = np.isin(np.arange(size), [*added])
        self._prefixed = prefixed

    def place(self, text: str, ids: list[int]) -> PlacedTokens | None:
        """Returns the tokens of a text with their places; None where spelling does not tell them."""
        written = text.encode()
        numbers = np.array(ids, dtype=np.int64)
        starts, lengths = self._starts[numbers], self._lengths[numbers]
        if self._prefixed != "nowhere":
            is_added = self._is_added[numbers]
            is_first = ~is_added
            is_first[1:] &= is_added[:-1] & (self._prefixed == "behind_added")
            lengths = lengths - is_first
            starts = starts + is_first
        ends = np.cumsum(lengths)
        if not len(ids) or ends[-1] != len(written):
            return None
        spelled = self._bytes[np.repeat(starts - ends + lengths, lengths) + np.arange(len(written))]
        if spelled.tobytes() != written:
            return None
        return PlacedTokens(numbers, ends.tolist(), text, written)


def spelled_in_bytes(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """Returns the spelling of each token of a vocabulary in which every byte is a character."""
    letters = {letter: byte for byte, letter in enumerate(byte_characters())}
    to_latin = str.maketrans(letters)
    return {
        number: token.translate(to_latin).encode("latin-1")
        for token, number in vocabulary.items()
        if letters.keys() >= set(token)
    }


def spelled_by_sentencepiece(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """Returns the spelling of each token of a vocabulary with `▁` for a space, and bytes for what has no token."""
    found = {number: token.replace("▁", " ").encode() for token, number in vocabulary.items()}
    names = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    return found | {vocabulary[name]: byte for name, byte in names.items() if name in vocabulary}


@lru_cache(maxsize=8)
def spelling_of(tokenizer) -> Spelling | None:
    """Returns the spelling of a fast transformers tokenizer's tokens; None if it says otherwise where tokens stand."""
    backend = backend_of(tokenizer)
    vocabulary = backend.get_vocab(with_added_tokens=False)
    spelled = spelled_by_sentencepiece(vocabulary) if "▁" in vocabulary else spelled_in_bytes(vocabulary)
    added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
    spelled |= {number: content.encode() for number, content in added.items()}
    probes = [PROBE, *(f"{PROBE}{content}{PROBE}" for content in list(added.values())[:1])]
    encodings = [backend.encode(probe, add_special_tokens=False) for probe in probes]
    for prefixed in get_args(Prefixed):
        spelling = Spelling(spelled, frozenset(added), prefixed)
        placed = [spelling.place(probe, encoding.ids) for probe, encoding in zip(probes, encodings, strict=True)]
        if [places_of(tokens) for tokens in placed] == [encoding.offsets for encoding in encodings]:
            return spelling
    return None


def places_of(tokens: PlacedTokens | None) -> list[tuple[int, int]] | None:
    """Returns the characters [start, end) of each token."""
    return None if tokens is None else [tokens.token_to_chars(token) for token in range(len(tokens))]
