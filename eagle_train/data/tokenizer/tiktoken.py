"""Reads the byte pieces of a tiktoken vocabulary, and writes bytes as the characters of byte-level BPE.

Source: openai/tiktoken, `load_tiktoken_bpe` (file format); GPT-2's encoder.py (bytes as characters);
meta-llama/llama-models, models/llama3/tokenizer.py (how Llama 3 splits text).
"""

from __future__ import annotations

import base64
import binascii

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's words; the vocabulary file does not hold it."""


def is_tiktoken(data: bytes) -> bool:
    """Returns whether `data` begins like a tiktoken vocabulary: base64, a space, rank 0."""
    first = data.split(b"\n", 1)[0].split()
    return len(first) == 2 and first[1] == b"0"


def read_tiktoken(data: bytes) -> list[str]:
    """Returns the pieces in a tiktoken vocabulary, a character per byte, in the order of their ranks.

    Raises:
        ValueError: unless every line is base64 and its rank, counted from 0.
    """
    characters = byte_characters()
    pieces = []
    for line in data.splitlines():
        try:
            text, rank = line.split()
            if int(rank) != len(pieces):
                raise ValueError(f"rank {int(rank)} follows {len(pieces) - 1}")
            pieces.append("".join(characters[byte] for byte in base64.b64decode(text, validate=True)))
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {len(pieces) + 1} is no tiktoken entry ({error}); download it again") from error
    return pieces


def byte_characters() -> list[str]:
    """Returns the character that stands for each byte: itself where it is visible, else U+0100 and up."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 0x100 + hidden.index(byte)) for byte in range(256)]
