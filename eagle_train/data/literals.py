"""Names of special tokens that stand in the text of a sample: text, not tokens.

A question may quote `<|im_end|>`, or `</s>` in HTML. Read as the special token it would end the turn, or put an image
where there is none. Dropping such samples would lose what is about them, and changing the text would teach the change.
So they are tokenized as ordinary text, as transformers' `split_special_tokens` does, while the template's own keep
their meaning: a mark is put inside the name, so that the tokenizer does not find it, and a normalizer takes the mark
out again before the text is split. Text without such names, nearly all, goes the usual way.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

from tokenizers import normalizers

from eagle_train.types import Message

MARK = "\ufdd0"
"""A noncharacter, which no text for exchange may hold (Unicode 23.7)."""


class Literals:
    """Keeps special tokens out of the text of samples.

    Args:
        tokenizer: a fast transformers tokenizer.
        allowed: special tokens that samples may use, such as `<box>`.
    """

    def __init__(self, tokenizer, allowed: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {*allowed}
        self._name = re.compile("|".join(map(re.escape, sorted(names))) or "(?!)")
        self._start = re.compile(f"(?=(?:{self._name.pattern}))(.)", re.DOTALL)

    def mark(self, messages: Sequence[Message]) -> list[Message]:
        """Returns the messages with a mark inside every name of a special token."""
        return [self._mark(message) for message in messages]

    def _mark(self, message: Message) -> Message:
        if not self._name.search("".join([part for part in message.content if isinstance(part, str)])):
            return message
        parts = (self._start.sub(rf"\1{MARK}", p) if isinstance(p, str) else p for p in joined(message.content))
        return replace(message, content=tuple(parts))

    @cached_property
    def marked_tokenizer(self):
        """The tokenizer that takes the marks out."""
        tokenizer = copy.deepcopy(self._tokenizer)
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Replace(MARK, ""), *([backend.normalizer] if backend.normalizer else [])]
        backend.normalizer = normalizers.Sequence(steps)
        return tokenizer


@lru_cache(maxsize=8)
def literals_of(tokenizer, allowed: tuple[str, ...]) -> Literals:
    """Returns the `Literals` of a tokenizer; the same object for the same arguments."""
    return Literals(tokenizer, allowed)


def joined(content: Sequence[str | int]) -> list[str | int]:
    """Returns the content with neighbouring texts as one: a name may begin in one and end in the next."""
    parts: list[str | int] = []
    for part in content:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return parts
