"""Reads a SentencePiece BPE model: its pieces with their scores, and how it prepares text.

The file is a protobuf message; the few fields that matter are read from the wire format, without the library.

Source: google/sentencepiece, sentencepiece_model.proto (field numbers); the protobuf encoding guide.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

PIECES, TRAINER, NORMALIZER = 1, 2, 3
BPE = 2
SPACE = "▁"
"""Stands for a space in pieces, U+2581."""


class Kind(IntEnum):
    """What a piece is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What decides how text is split."""

    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool
    """Whether a space is put before every text."""

    def mergeable(self) -> list[str]:
        """Returns the pieces that merging can make, best first."""
        normal = [piece for piece in self.pieces if piece.kind is Kind.NORMAL]
        return [piece.text for piece in sorted(normal, key=lambda piece: -piece.score)]

    def texts(self, kind: Kind) -> list[str]:
        """Returns the pieces of one kind, in the order of their ids."""
        return [piece.text for piece in self.pieces if piece.kind is kind]


def read_sentencepiece(data: bytes) -> SentencePieceModel:
    """Returns the model in the bytes of a `tokenizer.model`.

    Raises:
        ValueError: if it is no such model, or one that works otherwise than Llama's: not BPE, without byte fallback,
            with normalization of characters or spaces, or with unused pieces.
    """
    try:
        message = list(read_fields(data))
        trainer, normalizer = (dict(read_fields(last(message, field))) for field in (TRAINER, NORMALIZER))
        pieces = tuple(read_piece(value) for field, value in message if field == PIECES)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"not a SentencePiece model ({error}); download the file again") from error
    found = {
        "model_type": trainer.get(3, 1),
        "byte_fallback": trainer.get(35, 0),
        "treat_whitespace_as_suffix": trainer.get(24, 0),
        "precompiled_charsmap": len(normalizer.get(2, b"")),
        "remove_extra_whitespaces": normalizer.get(4, 1),
        "escape_whitespaces": normalizer.get(5, 1),
        "unused_pieces": sum(piece.kind is Kind.UNUSED for piece in pieces),
    }
    known = {"model_type": BPE, "byte_fallback": 1, "escape_whitespaces": 1}
    if other := {name: value for name, value in found.items() if value != known.get(name, 0)}:
        raise ValueError(
            f"SentencePiece model with {other}; only models like Llama's are converted, use tokenizer.json"
        )
    return SentencePieceModel(pieces, add_dummy_prefix=bool(normalizer.get(3, 1)))


def read_piece(data: bytes) -> Piece:
    """Returns the piece in one message."""
    fields = dict(read_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode(), score, Kind(fields.get(3, Kind.NORMAL)))


def last(message: list[tuple[int, int | bytes]], field: int) -> bytes:
    """Returns the value of a field that should be there once; the last one counts, as protobuf has it."""
    return dict(message)[field]


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) of a protobuf message: numbers as int, everything else as bytes.

    Raises:
        ValueError: for bytes that are no message.
    """
    place = 0
    while place < len(data):
        key, place = read_varint(data, place)
        wire = key & 7
        if wire == 0:
            value, place = read_varint(data, place)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {place}")
        size, place = read_varint(data, place) if wire == 2 else ({1: 8, 5: 4}[wire], place)
        if place + size > len(data):
            raise ValueError(f"{size} bytes wanted at byte {place} of {len(data)}")
        yield key >> 3, data[place : place + size]
        place += size


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Returns the number at `place` (seven bits a byte, the lowest first) and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
