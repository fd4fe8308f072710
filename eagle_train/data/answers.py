"""How long a conversation is up to the end of each of its answers, and the sample cut there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from tokenizers import Tokenizer

from eagle_train.data.chat import ChatTemplate, backend_of, first_of
from eagle_train.data.literals import MARK
from eagle_train.data.offsets import Tokens, num_begun
from eagle_train.data.spelling import spelling_of
from eagle_train.data.text_tokens import TextTokens
from eagle_train.types import Message, Sample


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """A conversation from its start to the end of one of its answers."""

    num_tokens: int
    """Of text; media not counted."""
    num_targets: int
    """Supervised tokens."""
    num_media: int


@dataclass(frozen=True, eq=False, slots=True)
class TokenizedText:
    """The text of a conversation."""

    ends: list[AnswerEnd]
    """Of all its answers."""
    tokens: TextTokens


@dataclass(frozen=True, slots=True)
class Run:
    """Text that is tokenized as one string; `ChatTemplate.encode` makes a `TextRun` of it."""

    text: str
    learnt: list[tuple[int, int]]
    """Characters [start, end) that are learnt: in order, none empty, none with an answer's end inside."""
    num_media: int
    """Media before it."""
    ends: list[int]
    """Characters up to the end of each answer that ends in it."""


class AnswerCounter:
    """Finds what `template.encode` would give for a conversation, and counts it up to each of its answers.

    The same texts go through the same tokenizer, each once and many in a batch. Targets are found by a few looks at the
    tokens around the ends of what is learnt, as tokens are in the order of their characters.

    Args:
        template: the strings around turns.
        tokenizer: a fast transformers tokenizer.
    """

    def __init__(self, template: ChatTemplate, tokenizer) -> None:
        self._template = template
        # Added tokens on whose right, or left, a text is tokenized as if it began, or ended, there.
        added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if not token.single_word}
        self._closing = frozenset(index for index, token in added.items() if not token.rstrip)
        self._opening = frozenset(index for index, token in added.items() if not token.lstrip)
        self._start = template.encode((), tokenizer)[0].ids.astype(np.int32)
        self._tokenizer = tokenizer
        self._backend = backend_of(tokenizer)
        self._spelling = spelling_of(tokenizer)

    def tokenize(self, conversations: Iterable[Sequence[Message]]) -> list[TokenizedText]:
        """Returns the tokens of each conversation, and the ends of all its answers."""
        marked = (self._template.mark(messages, self._tokenizer) for messages in conversations)
        laid_out = [lay_out_text(self._template, messages) for messages in marked]
        encoded = self._encode(dict.fromkeys(run.text for runs in laid_out for run in runs))  # prompts are in many
        return [self._count(runs, encoded) for runs in laid_out]

    def _encode(self, texts: Iterable[str]) -> dict[str, Tokens]:
        """Returns the tokens of each text."""
        encoded: dict[str, Tokens] = self._encode_spelled([text for text in texts if MARK not in text])
        rest = [text for text in texts if text not in encoded]
        for same in ([text for text in rest if MARK not in text], [text for text in rest if MARK in text]):
            if same:
                encodings = self._backend_for(same[0]).encode_batch(same, add_special_tokens=False)
                encoded |= zip(same, encodings, strict=True)
        return encoded

    def _encode_spelled(self, texts: Sequence[str]) -> dict[str, Tokens]:
        """Returns the tokens of those texts whose spelling tells where they stand.

        A tokenizer for which it seldom does, for example one that drops spaces, is not asked again.
        """
        if self._spelling is None or not texts:
            return {}
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        placed = (self._spelling.place(text, e.ids) for text, e in zip(texts, encodings, strict=True))
        found = {text: tokens for text, tokens in zip(texts, placed, strict=True) if tokens is not None}
        if len(found) < len(texts) / 2:
            self._spelling = None
        return found

    def _backend_for(self, text: str) -> Tokenizer:
        """Returns what tokenizes a text of `render`, with marks or without."""
        return self._template.backend_for(text, self._tokenizer) if MARK in text else self._backend

    def _count(self, runs: Sequence[Run], encoded: Mapping[str, Tokens]) -> TokenizedText:
        """Returns the tokens of one conversation, and the ends of all its answers."""
        parts = [self._start]
        num_tokens, targets = len(self._start), 0
        run_ends, stretches, ends = [], [], []
        for run in runs:
            encoding = encoded[run.text]
            learnt = learnt_tokens(encoding, run.learnt, self._backend)
            counts = [0, *accumulate(end - first for first, end in learnt)]
            for end in run.ends:
                here = self._tokens_up_to(run, end, encoding)
                if here is None:
                    spans = [span for span in run.learnt if span[0] < end]
                    alone = self._backend_for(run.text).encode(run.text[:end], add_special_tokens=False)
                    here = len(alone)
                    learnt_here = sum(end - first for first, end in learnt_tokens(alone, spans, self._backend))
                else:
                    learnt_here = counts[sum(start < end for start, _ in run.learnt)]
                ends.append(AnswerEnd(num_tokens + here, targets + learnt_here, run.num_media))
            stretches += [num_tokens + place for stretch in learnt for place in stretch]
            parts.append(np.asarray(encoding.ids, dtype=np.int32))
            num_tokens += len(encoding)
            run_ends.append(num_tokens)
            targets += counts[-1]
        run_ends, stretches = (np.array(places, dtype=np.int32) for places in (run_ends, stretches))
        return TokenizedText(ends, TextTokens(np.concatenate(parts), run_ends, stretches))

    def _tokens_up_to(self, run: Run, end: int, encoding: Tokens) -> int | None:
        """Returns how many tokens the first `end` characters give on their own; None if it takes encoding them.

        It is known where a token ends there and it or the next one is an added token: the text on either side of one is
        tokenized independently, but for spaces that some take. So is it for all templates whose answers end with one,
        not for `plain`, whose newline may share a token with what follows.
        """
        if end == len(run.text):
            return len(encoding)
        place = num_begun(encoding, end)
        if not 0 < place < len(encoding) or encoding.token_to_chars(place - 1)[1] > end:
            return None
        ids = encoding.ids
        return place if ids[place - 1] in self._closing or ids[place] in self._opening else None


def lay_out_text(template: ChatTemplate, messages: Sequence[Message]) -> list[Run]:
    """Returns the text runs of a conversation, those between its media."""
    items, ends = template.render_answers(messages)
    ends_of: dict[int, list[int]] = {}
    for item, num_pieces in ends:
        ends_of.setdefault(item, []).append(num_pieces)
    runs: list[Run] = []
    for number, pieces in enumerate(items):
        if isinstance(pieces, int):
            continue
        places = [0, *accumulate(len(text) for text, _ in pieces)]
        ends_here = [places[count] for count in ends_of.get(number, ())]
        learnt: list[tuple[int, int]] = []
        for (text, is_learnt), start in zip(pieces, places, strict=False):
            if is_learnt and text:
                joins = learnt and learnt[-1][1] == start and start not in ends_here
                learnt.append((learnt.pop()[0] if joins else start, start + len(text)))
        text = "".join([text for text, _ in pieces])
        runs.append(Run(text, learnt, number - len(runs), ends_here))
    return runs


def learnt_tokens(encoding: Tokens, spans: Sequence[tuple[int, int]], backend: Tokenizer) -> list[tuple[int, int]]:
    """Returns the first token that touches each span of characters, and the one behind the last; none is in two."""
    stretches = []
    taken = 0  # tokens before this one
    for start, end in spans:
        first = max(taken, first_of(encoding, start, backend))
        taken = max(first, num_begun(encoding, end))
        stretches.append((first, taken))
    return stretches


def first_answers(sample: Sample, count: int) -> Sample:
    """Returns the sample up to its `count`-th answer, with the media of the turns that stay."""
    ends = [place for place, message in enumerate(sample.messages, 1) if message.role == "assistant"]
    messages = sample.messages[: ends[count - 1]]
    num_media = sum(isinstance(part, int) for message in messages for part in message.content)
    return replace(sample, messages=messages, media=sample.media[:num_media])  # media are in reading order
