"""How many tokens short texts take that differ in their numbers only, such as "Frame 17 sampled at 8.50 seconds: ".

The vocabularies of the published LLMs (Llama 2 and 3, Vicuna, Yi, Qwen) have no token that holds a digit together with
anything else. So the digits of a text can be counted apart from the rest, and 500 labels cost a few look-ups in tables,
not 10 ms of tokenization. Where a vocabulary is not so, every text is tokenized.
"""

from __future__ import annotations

import re

import numpy as np

from eagle_train.data.chat import backend_of

DIGITS = re.compile("[0-9]+")
MIXED = re.compile("[0-9][^0-9\0]|[^0-9\0][0-9]")
"""In tokens joined by zero characters."""
BYTE = re.compile("<0x[0-9A-F]{2}>")
PROBES = ("Frame {} sampled at {}.{} seconds: ", "{}{}. {}", "\n{}a{}, <{}>\n")
PROBED = ("0", "7", "10", "19", "305", "1000", "98765", "00", "03")
MAX_KEPT = 1 << 17
"""Counts of texts that are kept."""


class NumberCosts:
    """Counts the tokens of texts as a tokenizer gives them, each on its own.

    Args:
        tokenizer: a fast transformers tokenizer.
    """

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._counts: dict[str, int] = {}
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.apart = digits_are_apart(tokenizer) and all(map(self._adds_up, PROBES))
        """Whether the digits of a text are counted apart from the rest."""

    def count(self, text: str) -> int:
        """Returns the number of tokens of `text`."""
        if not self.apart:
            return self._count(text)
        runs = DIGITS.findall(text)
        return self._count(DIGITS.sub("0", text)) + sum(self._extra(run) for run in runs)

    def extras(self, numbers: np.ndarray, width: int = 1) -> np.ndarray:
        """Returns (n,) int64: how many tokens each number takes more than a single zero; at least 0.

        Only for a tokenizer with digits `apart`.

        Args:
            numbers: (n,) int64, not negative.
            width: digits at least; shorter numbers have zeros in front.
        """
        if (highest := int(numbers.max(initial=0))) >= MAX_KEPT:  # a header may claim any duration
            return np.array([self._extra(f"{number:0{width}}") for number in numbers.tolist()], np.int64)
        return self._table(highest, width)[0][numbers]

    def least_extras(self, numbers: np.ndarray) -> np.ndarray:
        """Returns (n,) int64: the fewest tokens more than a zero that each number, or a higher one, takes.

        Higher means up to the highest of `numbers`.
        """
        if (highest := int(numbers.max(initial=0))) >= MAX_KEPT:
            return np.zeros(len(numbers), np.int64)
        return self._table(highest, 1)[1][numbers]

    def _table(self, highest: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the extras of the numbers up to `highest` at least, and the fewest from each number on."""
        extras, fewest = self._tables.get(width, (np.empty(0, np.int64),) * 2)
        if highest >= len(extras):
            end = 1 << max(7, highest.bit_length())  # at least twice as long, so few times
            more = [self._extra(f"{number:0{width}}") for number in range(len(extras), end)]
            extras = np.concatenate([extras, np.array(more, np.int64)])
            fewest = np.minimum.accumulate(extras[::-1])[::-1]
            self._tables[width] = extras, fewest
        return extras, fewest

    def _extra(self, digits: str) -> int:
        return self._count(digits) - self._count("0")

    def _count(self, text: str) -> int:
        if (count := self._counts.get(text)) is None:
            if len(self._counts) >= MAX_KEPT:
                self._counts.clear()
            count = self._counts[text] = len(backend_of(self._tokenizer).encode(text, add_special_tokens=False))
        return count

    def _adds_up(self, probe: str) -> bool:
        """Returns whether the digits of some texts are indeed independent of the rest."""
        texts = [probe.format(*(PROBED[(i * k) % len(PROBED)] for k in (1, 2, 5))) for i in range(len(PROBED))]
        rest = [self._count(DIGITS.sub("0", text)) for text in texts]
        added = [sum(self._extra(run) for run in DIGITS.findall(text)) for text in texts]
        return [self._count(text) for text in texts] == [a + b for a, b in zip(rest, added, strict=True)]


def digits_are_apart(tokenizer) -> bool:
    """Returns whether no token of the vocabulary holds a digit beside anything else, and each digit is a token.

    Added tokens such as `<|reserved_special_token_7|>` and byte tokens such as `<0x0A>` are names, not text.
    """
    vocabulary = tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if not vocabulary.issuperset("0123456789"):
        return False
    texts = [token for token in vocabulary if not (token.startswith("<0x") and BYTE.fullmatch(token))]
    return MIXED.search("\0".join(texts)) is None  # one search: there may be 150,000 tokens
