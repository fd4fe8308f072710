"""Chat templates as data: messages become token ids and a loss mask in one pass.

Text between two media is tokenized as one string, on its own, exactly as the published models saw it, and the mask
is read off the character offsets: a token is a target if it covers any character of an answer or of its
end token. So no length arithmetic is needed, and none can be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from eagle_train.data.literals import MARK, literals_of
from eagle_train.data.media_text import MediaText
from eagle_train.data.offsets import Tokens, num_begun, num_ended
from eagle_train.types import Message, Role


@dataclass(frozen=True, eq=False, slots=True)
class TextRun:
    """Tokens between two media."""

    ids: np.ndarray
    """(n,) int64."""
    is_target: np.ndarray
    """(n,) bool: the token touches learnt text."""


TURN_TOKEN = re.compile(r"<\|[^<|>]+\|>")
"""How all families write the special tokens around turns, where they have any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """The strings one LLM family puts around a turn. Adding a family is adding a YAML file."""

    prefix: Mapping[Role, str]
    """Text before a turn's content; after the last user turn, the assistant's asks for the answer."""
    suffix: Mapping[Role, str]
    """Text after it; the assistant's is learnt, it ends the answer."""
    answer_prefix: str = ""
    """Text between the assistant's prefix and its answer that is learnt: a space that is one token with a word."""
    separator: str = ""
    """Text after every turn, never learnt."""
    start: str | None = ""
    """Text before everything, tokenized on its own; None: what the tokenizer puts before a text, if anything."""
    system: str | None = None
    """System prompt of samples that bring none."""
    media_first: bool = False
    """True: a turn's media come before its text, each followed by a newline, and the text is stripped."""
    after_media: str | None = None
    """Text between a medium and what follows it in its turn, instead of the newline that records have there; None: what
    the record has."""
    strip: bool = False
    """True: spaces and newlines at both ends of a turn are no part of it."""
    media: MediaText = field(default_factory=MediaText)
    """The text that belongs to media, and is laid out with them."""
    image_token: str | None = None
    """Token that fills the image positions; None: the padding or end token (its embedding is replaced)."""
    video_token: str | None = None
    """Token that fills the positions of videos; None: that of images."""
    special_tokens: Sequence[str] = ()
    """Names that the tokenizer must hold as tokens, besides `content_tokens`; their ids are nowhere else."""
    content_tokens: Sequence[str] = ()
    """Special tokens that samples may write, such as `<box>`; all others in their text are ordinary text."""
    keep_user_text: bool = True
    """False: only the media of user turns stay (LLaVA's `plain` template of stage 1)."""
    stop: Sequence[str] = field(default_factory=tuple)
    """Tokens that end an answer at inference, besides the assistant's suffix."""

    def render(self, messages: Sequence[Message]) -> list[list[tuple[str, bool]] | int]:
        """Returns the conversation as text runs, each of (text, is learnt) pieces, and media indices between."""
        return self.render_answers(messages)[0]

    def render_answers(
        self, messages: Sequence[Message]
    ) -> tuple[list[list[tuple[str, bool]] | int], list[tuple[int, int]]]:
        """Returns what `render` does, and where each answer ends: the index of its run, and pieces of it till there.

        What is before such an end is what `render` gives for the messages up to there.
        """
        turns = list(messages)
        if self.system is not None and (not turns or turns[0].role != "system"):
            turns.insert(0, Message(role="system", content=(self.system,)))
        items: list[list[tuple[str, bool]] | int] = [[]]
        ends = []
        for turn in turns:
            learnt = turn.role == "assistant"
            items[-1] += [(self.prefix[turn.role], False), (self.answer_prefix if learnt else "", True)]
            for part, is_own in self._parts(turn.content):
                if isinstance(part, int):
                    items += [part, []]
                elif self.keep_user_text or turn.role != "user":
                    items[-1].append((part, learnt and is_own))
            items[-1] += [(self.suffix[turn.role], learnt), (self.separator, False)]
            if learnt:
                ends.append((len(items) - 1, len(items[-1])))
        return items, ends

    def _parts(self, content: Sequence[str | int]) -> Iterator[tuple[str | int, bool]]:
        """Yields text and media of a turn in their order, and whether the text is the turn's own."""
        parts = media_to_front(content) if self.media_first else list(content)
        if self.strip:
            parts = strip_ends(parts)
        for place, part in enumerate(parts):
            after = place > 0 and isinstance(parts[place - 1], int)
            if not after or self.after_media is None:
                yield part, True
            else:
                yield self.after_media, False
                yield part.removeprefix("\n") if isinstance(part, str) else part, True
        if parts and isinstance(parts[-1], int) and self.after_media and not self.strip:
            yield self.after_media, False

    def encode(self, messages: Sequence[Message], tokenizer) -> list[TextRun | int]:
        """Returns the token ids and targets of `messages`, with media indices where media stand.

        The first run is the start of the conversation. Special tokens that the messages name are ordinary text, but for
        `content_tokens`.

        Args:
            tokenizer: a fast transformers tokenizer (offsets are needed).
        """
        return self._encode_items(self.render(self.mark(messages, tokenizer)), tokenizer)

    def mark(self, messages: Sequence[Message], tokenizer) -> list[Message]:
        """Returns the messages with the names of special tokens marked as text, see `literals`."""
        return literals_of(tokenizer, tuple(self.content_tokens)).mark(messages)

    def backend_for(self, text: str, tokenizer) -> Tokenizer:
        """Returns what tokenizes a text of `render`, with marks or without."""
        if MARK in text:
            tokenizer = literals_of(tokenizer, tuple(self.content_tokens)).marked_tokenizer
        return backend_of(tokenizer)

    def encode_prompt(self, messages: Sequence[Message], tokenizer) -> list[TextRun | int]:
        """Returns `messages` encoded so that the model continues with the assistant's answer."""
        items = self.render(self.mark(messages, tokenizer))
        items[-1].append((self.prefix["assistant"], False))
        return self._encode_items(items, tokenizer)

    def _encode_items(self, items: Sequence[list[tuple[str, bool]] | int], tokenizer) -> list[TextRun | int]:
        """Returns the start and what `render` gives, encoded."""
        backend = backend_of(tokenizer)
        ids = backend.encode(self.start or "", add_special_tokens=self.start is None).ids
        found: list[TextRun | int] = [TextRun(np.array(ids, dtype=np.int64), np.zeros(len(ids), dtype=bool))]
        for item in items:
            if not isinstance(item, int):
                marked = next((text for text, _ in item if MARK in text), None)
                item = encode_run(item, backend if marked is None else self.backend_for(marked, tokenizer))
            found.append(item)
        return found

    def missing_tokens(self, tokenizer) -> list[str]:
        """Returns the special tokens of the template that the tokenizer does not have, those around turns included.

        It would cut them to letters in silence, and an answer would end with no token that can stop a generation.
        """
        fillers = [token for token in (self.image_token, self.video_token) if token]
        turns = "".join([self.start or "", *self.prefix.values(), *self.suffix.values()])
        names = [*TURN_TOKEN.findall(turns), *self.special_tokens, *self.content_tokens, *fillers]
        return [name for name in dict.fromkeys(names) if tokenizer.backend_tokenizer.token_to_id(name) is None]

    def stop_ids(self, tokenizer) -> list[int]:
        """Returns the ids of the tokens that end an answer."""
        names = [self.suffix["assistant"], *self.stop]
        ids = [tokenizer.encode(name, add_special_tokens=False) for name in names if name.strip()]
        return sorted({tokenizer.eos_token_id, *(one[0] for one in ids if len(one) == 1)} - {None})


def backend_of(tokenizer) -> Tokenizer:
    """Returns what a fast transformers tokenizer wraps, set as a call of it without options would.

    The call itself takes a fifth of the time that a text takes.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def encode_run(pieces: Sequence[tuple[str, bool]], backend: Tokenizer) -> TextRun:
    """Returns one text run of (text, is learnt) pieces tokenized as a whole, tokens that touch learnt text marked."""
    text = "".join([text for text, _ in pieces])
    if not text:
        return TextRun(np.empty(0, dtype=np.int64), np.empty(0, dtype=bool))
    encoding = backend.encode(text, add_special_tokens=False)
    is_target = np.zeros(len(encoding), dtype=bool)
    start = 0  # characters
    for piece, is_learnt in pieces:
        end = start + len(piece)
        if is_learnt and piece:
            is_target[first_of(encoding, start, backend) : num_begun(encoding, end)] = True
        start = end
    return TextRun(np.array(encoding.ids, dtype=np.int64), is_target)


def first_of(encoding: Tokens, place: int, backend: Tokenizer) -> int:
    """Returns the first token that covers a character from `place` on with more than the spaces it swallows.

    Phi-3's special tokens take the spaces and newlines behind them: of "<|assistant|>\\n  Yes", all before "Yes" is one
    token, which stays the prompt's.

    Args:
        backend: of the encoding.
    """
    number = num_ended(encoding, place)
    if number < len(encoding):
        begin, _ = encoding.token_to_chars(number)
        if begin < place and begin + len(backend.id_to_token(encoding.ids[number])) <= place:
            return number + 1
    return number


def media_to_front(content: Sequence[str | int]) -> list[str | int]:
    """Returns a turn that holds media with them in front, each followed by a newline; other turns as they are.

    Source: Eagle 1 and LLaVA-1.5, train.py, `preprocess_multimodal`.
    """
    media = [part for part in content if isinstance(part, int)]
    if not media:
        return list(content)
    text = "".join(part for part in content if isinstance(part, str)).strip()
    front: list[str | int] = [piece for part in media for piece in (part, "\n")]
    return [*front, text] if text else front[:-1]


def strip_ends(parts: Sequence[str | int]) -> list[str | int]:
    """Returns a turn without the spaces and newlines that it begins and ends with, and without empty texts."""
    kept = list(parts)
    if kept and isinstance(kept[0], str):
        kept[0] = kept[0].lstrip()
    if kept and isinstance(kept[-1], str):
        kept[-1] = kept[-1].rstrip()
    return [part for part in kept if part != ""]
