"""Small vocabularies in the forms in which models are published, and slow, plain tokenizers to compare with."""

from __future__ import annotations

import base64
import json
import re
import struct
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, models, trainers

TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What is in the picture?\nASSISTANT: Two cats  and    three dogs."
    "\n    def f(x):\n        return x == 12345\nsystem user assistant Answer the questions. It's été, aaaa aaaaa.\n"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def learn_pieces(text: str, size: int = 400) -> list[str]:
    """Returns the pieces that BPE learns on `text`: merged ones in their order, then characters.

    As in Llama's vocabulary, spaces (▁) stand in front of a piece only.
    """
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator([text[i : i + 30] for i in range(0, len(text), 7)] * 3, trainer)
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    pieces = [piece for piece in pieces if re.fullmatch("▁*[^▁]*", piece)]
    return sorted(pieces, key=lambda piece: len(piece) == 1)  # stable


def sentencepiece_pieces(own: tuple[str, ...] = ()) -> list[tuple[str, float, int]]:
    """Returns (text, score, kind) of the pieces of a model like Llama's; `own` are user-defined ones."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(text, 0.0, USER_DEFINED) for text in own]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    learnt = learn_pieces(TEXT.replace(" ", "▁").replace("\n", "|").replace("|", ""))
    return pieces + [(text, -float(place), NORMAL) for place, text in enumerate(learnt)]


def sentencepiece_bytes(pieces, *, prefix: bool = True, **changes: int) -> bytes:
    """Returns a model file; `changes` are `model_type`, `byte_fallback` or `remove_extra_whitespaces`."""
    settings = {"model_type": 2, "byte_fallback": 1, "remove_extra_whitespaces": 0} | changes
    data = b""
    for text, score, kind in pieces:
        piece = field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + field(3, kind)
        data += field(1, piece)
    trainer = field(3, settings["model_type"]) + field(35, settings["byte_fallback"])
    normalizer = field(1, b"identity") + field(3, int(prefix)) + field(4, settings["remove_extra_whitespaces"])
    return data + field(2, trainer) + field(3, normalizer)


def field(number: int, value: int | bytes) -> bytes:
    """Returns one protobuf field."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    """Returns a number in seven bits a byte."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def write_folder(folder: Path, vocabulary: bytes, **config) -> Path:
    """Writes a tokenizer folder as the hub has it for Vicuna and Llama 2: a vocabulary and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(vocabulary)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "LlamaTokenizer"} | config))
    return folder


class SlowLlama:
    """transformers 4.44's slow Llama tokenizer, over SentencePiece's BPE as its definition has it.

    Args:
        pieces: (text, score, kind), a piece's id is its place.
        legacy: as in the config.
        prefix: the model's `add_dummy_prefix`, which only `legacy` asks for.
        special: tokens that are found in the text first.
    """

    def __init__(self, pieces, *, legacy: bool, prefix: bool = True, special=("<s>", "</s>", "<unk>")) -> None:
        self.ids = {text: index for index, (text, _, _) in enumerate(pieces)}
        self.scores = {text: score for text, score, kind in pieces if kind == NORMAL}
        own = sorted((text for text, _, kind in pieces if kind == USER_DEFINED), key=len, reverse=True)
        self.symbols = re.compile("|".join([*map(re.escape, own), "."]), re.DOTALL)
        self.own, self.legacy, self.prefix, self.special = set(own), legacy, prefix, special

    def __call__(self, text: str) -> list[int]:
        """Returns the ids of `text`, without a begin token."""
        ids = []
        parts = re.split(f"({'|'.join(map(re.escape, self.special))})", text)
        for place, part in enumerate(parts):
            if part in self.special:
                ids.append(self.ids[part])
            elif part:
                prefixed = self.prefix if self.legacy else place == 0
                ids += self.split("▁" * prefixed + part.replace(" ", "▁"))
        return ids

    def split(self, text: str) -> list[int]:
        """Returns the ids that merging gives: the pair with the best piece first, the leftmost of equals."""
        symbols = self.symbols.findall(text)
        while True:
            pairs = [
                (-self.scores[a + b], place)
                for place, (a, b) in enumerate(pairwise(symbols))
                if a + b in self.scores and not {a, b} & self.own
            ]
            if not pairs:
                break
            place = min(pairs)[1]
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        return [
            index
            for symbol in symbols
            for index in (
                [self.ids[symbol]]
                if symbol in self.scores or symbol in self.own
                else [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            )
        ]


def tiktoken_bytes(pieces: list[bytes]) -> bytes:
    """Returns a tiktoken vocabulary file."""
    return b"".join(base64.b64encode(piece) + f" {rank}\n".encode() for rank, piece in enumerate(pieces))


def tiktoken_split(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Returns the ids of one word: it is a piece, or the pair of the lowest rank merges first."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
        place = min(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [ranks[part] for part in parts]
