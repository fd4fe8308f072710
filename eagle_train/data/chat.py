"""Chat templates as data: messages become token ids and a loss mask in one pass.

Text between two media is tokenized as one string, exactly as the published models saw it, and the mask
is read off the character offsets: a token is a target if it covers any character of an answer or of its
end token. So no length arithmetic is needed, and none can be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eagle_train.types import Message, Role


@dataclass(frozen=True, slots=True)
class TextRun:
    """Tokens between two media."""

    ids: list[int]
    is_target: list[bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """The strings one LLM family puts around a turn. Adding a family is adding a YAML file."""

    prefix: Mapping[Role, str]
    """Text before a turn's content."""
    suffix: Mapping[Role, str]
    """Text after it; the assistant's is learnt, it ends the answer."""
    separator: str = ""
    """Text after every turn, never learnt."""
    start: str = ""
    """Text before everything, for example the begin-of-sequence token."""
    system: str | None = None
    """System prompt of samples that bring none."""
    media_prefix: str = ""
    """Text before every image or video frame."""
    media_suffix: str = ""
    image_token: str | None = None
    """Token that fills the image positions; None: the padding token (its embedding is replaced)."""
    generation_prompt: str = ""
    """What follows the last user turn when the model is to answer."""
    keep_user_text: bool = True
    """False: only the media of user turns stay (LLaVA's `plain` template of stage 1)."""
    stop: Sequence[str] = field(default_factory=tuple)
    """Tokens that end an answer at inference, besides the assistant's suffix."""

    def render(self, messages: Sequence[Message]) -> list[list[tuple[str, bool]] | int]:
        """Returns the conversation as text runs, each of (text, is learnt) pieces, and media indices between."""
        turns = list(messages)
        if self.system is not None and (not turns or turns[0].role != "system"):
            turns.insert(0, Message(role="system", content=(self.system,)))
        items: list[list[tuple[str, bool]] | int] = [[(self.start, False)]]
        for turn in turns:
            learnt = turn.role == "assistant"
            items[-1].append((self.prefix[turn.role], False))
            for part in turn.content:
                if isinstance(part, int):
                    items[-1].append((self.media_prefix, False))
                    items += [part, [(self.media_suffix, False)]]
                elif self.keep_user_text or turn.role != "user":
                    items[-1].append((part, learnt))
            items[-1] += [(self.suffix[turn.role], learnt), (self.separator, False)]
        return items

    def encode(self, messages: Sequence[Message], tokenizer) -> list[TextRun | int]:
        """Returns the token ids and targets of `messages`, with media indices where media stand.

        Args:
            tokenizer: a fast transformers tokenizer (offsets are needed).
        """
        return [item if isinstance(item, int) else encode_run(item, tokenizer) for item in self.render(messages)]

    def encode_prompt(self, messages: Sequence[Message], tokenizer) -> list[TextRun | int]:
        """Returns `messages` encoded so that the model continues with the assistant's answer."""
        items = self.render(messages)
        items[-1].append((self.generation_prompt, False))
        return [item if isinstance(item, int) else encode_run(item, tokenizer) for item in items]

    def stop_ids(self, tokenizer) -> list[int]:
        """Returns the ids of the tokens that end an answer."""
        names = [self.suffix["assistant"], *self.stop]
        ids = [tokenizer.encode(name, add_special_tokens=False) for name in names if name.strip()]
        return sorted({tokenizer.eos_token_id, *(one[0] for one in ids if len(one) == 1)} - {None})


def encode_run(pieces: Sequence[tuple[str, bool]], tokenizer) -> TextRun:
    """Returns one text run tokenized as a whole, with the tokens that touch learnt text marked."""
    text = "".join(piece for piece, _ in pieces)
    if not text:
        return TextRun([], [])
    learnt = bytearray()
    for piece, is_learnt in pieces:
        learnt += bytes([is_learnt]) * len(piece)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    targets = [any(learnt[start : max(end, start + 1)]) for start, end in encoded["offset_mapping"]]
    return TextRun(encoded["input_ids"], targets)
