"""Chat templates as data: messages become token ids and a loss mask in one pass.

Text between two media is tokenized as one string, on its own, exactly as the published models saw it, and the mask
is read off the character offsets: a token is a target if it covers any character of an answer or of its
end token. So no length arithmetic is needed, and none can be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from eagle_train.data.offsets import num_begun, num_ended
from eagle_train.types import Message, Role


@dataclass(frozen=True, eq=False, slots=True)
class TextRun:
    """Tokens between two media."""

    ids: np.ndarray
    """(n,) int64."""
    is_target: np.ndarray
    """(n,) bool: the token touches learnt text."""


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
    media_prefix: str = ""
    """Text before every image or video frame."""
    media_suffix: str = ""
    image_token: str | None = None
    """Token that fills the image positions; None: the padding or end token (its embedding is replaced)."""
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
            for part in media_to_front(turn.content) if self.media_first else turn.content:
                if isinstance(part, int):
                    items[-1].append((self.media_prefix, False))
                    items += [part, [(self.media_suffix, False)]]
                elif self.keep_user_text or turn.role != "user":
                    items[-1].append((part, learnt))
            items[-1] += [(self.suffix[turn.role], learnt), (self.separator, False)]
            if learnt:
                ends.append((len(items) - 1, len(items[-1])))
        return items, ends

    def encode(self, messages: Sequence[Message], tokenizer) -> list[TextRun | int]:
        """Returns the token ids and targets of `messages`, with media indices where media stand.

        The first run is the start of the conversation.

        Args:
            tokenizer: a fast transformers tokenizer (offsets are needed).
        """
        return self._encode_items(self.render(messages), tokenizer)

    def encode_prompt(self, messages: Sequence[Message], tokenizer) -> list[TextRun | int]:
        """Returns `messages` encoded so that the model continues with the assistant's answer."""
        items = self.render(messages)
        items[-1].append((self.prefix["assistant"], False))
        return self._encode_items(items, tokenizer)

    def _encode_items(self, items: Sequence[list[tuple[str, bool]] | int], tokenizer) -> list[TextRun | int]:
        """Returns the start and what `render` gives, encoded."""
        backend = backend_of(tokenizer)
        ids = backend.encode(self.start or "", add_special_tokens=self.start is None).ids
        start = TextRun(np.array(ids, dtype=np.int64), np.zeros(len(ids), dtype=bool))
        return [start, *(item if isinstance(item, int) else encode_run(item, backend) for item in items)]

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
            is_target[num_ended(encoding, start) : num_begun(encoding, end)] = True
        start = end
    return TextRun(np.array(encoding.ids, dtype=np.int64), is_target)


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
