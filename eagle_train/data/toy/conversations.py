"""From questions and media to the canonical record of a shard."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eagle_train.data.toy.scenes import Question
from eagle_train.types import MediaKind

SUFFIXES: tuple[tuple[MediaKind, str], ...] = (("image", "png"), ("video", "mp4"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """One image or video as the bytes of its file."""

    kind: MediaKind
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A question, with text and media in the order they are read, and its answer."""

    question: tuple[str | int, ...]
    """`str` is text, `int` an index into the conversation's media."""
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns about media; every attachment appears in one question."""

    turns: tuple[Turn, ...]
    media: tuple[Attachment, ...] = ()


def ask_about(attachment: Attachment, questions: Sequence[Question], rng: random.Random) -> Conversation:
    """Returns a conversation of the questions in their order; the attachment opens the first one."""
    asked = [(rng.choice(question.wordings), question.answer) for question in questions]
    first, *others = asked
    turns = [Turn(question=(0, first[0]), answer=first[1])]
    turns += [Turn(question=(text,), answer=answer) for text, answer in others]
    return Conversation(turns=tuple(turns), media=(attachment,))


def shuffled(questions: Sequence[Question], rng: random.Random, *, least: int) -> list[Question]:
    """Returns at least `least` (or all) of the questions in random order.

    A question for the half comes last, because being asked it gives away that there is one shape.
    """
    num_questions = rng.randint(min(least, len(questions)), len(questions))
    return sorted(rng.sample(questions, num_questions), key=lambda question: question.type == "half")


def canonical_record(conversation: Conversation, meta: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the canonical record of a shard and the media bytes by member extension."""
    messages = []
    for turn in conversation.turns:
        parts = [
            {"type": "media", "index": part} if isinstance(part, int) else {"type": "text", "text": part}
            for part in turn.question
        ]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    suffixes = dict(SUFFIXES)
    members = [f"{index}.{suffixes[item.kind]}" for index, item in enumerate(conversation.media)]
    named = list(zip(members, conversation.media, strict=True))
    media = [{"kind": item.kind, "member": member} for member, item in named]
    record = {"messages": messages, "media": media, "meta": dict(meta)}
    return record, {member: item.data for member, item in named}


def iter_texts(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yields every text of canonical records, for example to train a tokenizer on."""
    for record in records:
        for message in record["messages"]:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")
