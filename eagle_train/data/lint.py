"""What is wrong or odd about a sample's text: findings, each with a remedy. Nothing here reads a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from eagle_train.data.schemas import Record
from eagle_train.types import Message

EXCERPT = 90
"""Characters of a text that are shown."""


class Kind(NamedTuple):
    """A kind of finding."""

    is_error: bool
    """A run would leave the sample out."""
    remedy: str


KINDS: Mapping[str, Kind] = {
    "bad_record": Kind(True, "correct the record to one of the accepted shapes"),
    "missing_shard": Kind(True, "restore the shard, or build the data set again"),
    "missing_media": Kind(True, "add the file, correct its path or media_root, or leave the record out"),
    "unreadable_image": Kind(True, "download it again, or convert it to PNG or JPEG"),
    "unreadable_video": Kind(True, "download it again, or transcode it to H.264 in mp4"),
    "changed_media": Kind(True, "restore the file that the record names, or delete the shard's index: it is made anew"),
    "empty_clip": Kind(True, "correct start and end, in seconds of the file"),
    "placeholder_mismatch": Kind(True, "give every image and video one <image> or <video>, and no other"),
    "no_answer": Kind(True, "add the answers, or leave the record out"),
    "length_mismatch": Kind(True, "the file and its header disagree: convert it anew, and build the index again"),
    "too_long": Kind(True, "raise max_length, split the conversation, or set data.too_long to KeepTurns"),
    "unreadable_file": Kind(True, "the file is cut short or damaged: download or export it again"),
    "duplicate_key": Kind(True, "only the first sample of a key is used: give each its own"),
    "duplicate_id": Kind(False, "records share an id; see whether one is there twice"),
    "duplicate_sample": Kind(False, "same text and same media: keep one, or raise its source's repeat instead"),
    "duplicate_text": Kind(False, "same long text with other media: is it a template, or a mistake of a join?"),
    "long_text": Kind(False, "count its tokens with tokenizer=, chat_template= and max_length="),
    "special_token": Kind(False, "the tokenizer reads it as a control token: take it out of the text"),
    "role_marker": Kind(False, "markers of another template: split the text into turns"),
    "placeholder_in_answer": Kind(False, "the model would learn to write it: take it out"),
    "placeholder_as_text": Kind(False, "no image is named, so it is text: name the image, or take it out"),
    "media_in_answer": Kind(False, "an image stands in an answer: move it to the question"),
    "empty_question": Kind(False, "a turn of the user has neither text nor media: add what was asked"),
    "empty_answer": Kind(False, "one answer of several is empty, its end token is learnt: add it or cut the turn"),
    "answer_is_question": Kind(False, "the answer repeats the question: correct it or leave the record out"),
    "markup": Kind(False, "HTML entities or tags: unescape them, unless they are meant"),
    "mojibake": Kind(False, "UTF-8 read as another encoding: decode the source anew"),
    "odd_size": Kind(False, "an image with a side under 8 pixels or one 64 times the other: look at it"),
    "web_media": Kind(False, "fetched whenever the sample is read: `data build` from these tars stores it"),
    "pixel_limits": Kind(False, "only models of native resolution follow sizes in pixels, those of tiles do not"),
    "unused_media": Kind(False, "named by no turn and never read: reference it or delete it"),
}

PLACEHOLDER = re.compile(r"<(?:image|video)(?:-\d{1,6})?>")
# Template strings that belong around turns: ChatML, Llama 2 and 3, Gemma, Phi and toy, Vicuna, Alpaca.
ROLE_MARKER = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|eot_id|start_header_id|end_header_id|begin_of_text|system|user|assistant|end)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>(?![a-z])"
    r"|(?:^|\s)(?:USER|ASSISTANT|Human|Assistant):(?=\s)"
    r"|(?:^|\n)#{2,3} ?(?:Human|Assistant|Instruction|Response|User)\b:?"
)
MARKUP = re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d{2,5}|#x[0-9a-fA-F]{2,4});|</?(?:br|p|div|span)\s*/?>")
MOJIBAKE = re.compile("\ufffd|â€[™œ\x9d“”¦]|Ã[\x80-\xbf©¨§¤¶¼±]|ï»¿")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a sample.

    Args:
        kind: one of `KINDS`.
        excerpt: what it looks like there.
    """

    kind: str
    excerpt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TextChecks:
    """What texts are checked against.

    Args:
        special_tokens: of the tokenizer; empty if there is none.
        max_characters: of a conversation, where tokens are not counted.
    """

    special_tokens: Sequence[str] = ()
    max_characters: int = 50_000
    special: re.Pattern | None = field(init=False)

    def __post_init__(self) -> None:
        names = sorted((name for name in self.special_tokens if len(name) > 1), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, names))) if names else None
        object.__setattr__(self, "special", pattern)


def check_texts(record: Record, checks: TextChecks) -> Iterator[Finding]:
    """Yields what is odd about the turns of a record, at most one finding of a kind."""
    found: dict[str, str] = {}
    question = ""
    for message in record.messages:
        text = text_of(message)
        for kind, excerpt in check_turn(message, text, question, bool(record.media), checks):
            found.setdefault(kind, excerpt)
        if message.role == "user":
            question = text.strip()
    length = sum(len(text_of(message)) for message in record.messages)
    if length > checks.max_characters:
        found["long_text"] = f"{length:,} characters, more than max_characters={checks.max_characters:,}"
    yield from (Finding(kind, excerpt) for kind, excerpt in found.items())


def check_turn(
    message: Message, text: str, question: str, has_media: bool, checks: TextChecks
) -> Iterator[tuple[str, str]]:
    """Yields kind and excerpt of what is odd about one turn.

    Args:
        question: of the turn before.
        has_media: whether the sample has any.
    """
    answers = message.role == "assistant"
    media = [part for part in message.content if isinstance(part, int)]
    if answers and media:
        yield "media_in_answer", short(text)
    if message.role == "user" and not media and not text.strip():
        yield "empty_question", repr(text)
    if answers and not media and not text.strip():
        yield "empty_answer", repr(text)
    if answers and text.strip() and text.strip() == question:
        yield "answer_is_question", short(text)
    if match := PLACEHOLDER.search(text):
        kind = "placeholder_in_answer" if answers else "placeholder_as_text"
        yield kind, around(text, match)
    if checks.special and (match := checks.special.search(text)):
        yield "special_token", around(text, match)
    elif match := ROLE_MARKER.search(text):
        yield "role_marker", around(text, match)
    if match := MARKUP.search(text):
        yield "markup", around(text, match)
    if match := MOJIBAKE.search(text):
        yield "mojibake", around(text, match)


def text_of(message: Message) -> str:
    """Returns the text of a turn, its media left out."""
    return "".join(part for part in message.content if isinstance(part, str))


def short(text: str) -> str:
    """Returns the beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT else f"{line[: EXCERPT - 1]}…"


def around(text: str, match: re.Match) -> str:
    """Returns the text around a match, on one line."""
    start = max(0, match.start() - EXCERPT // 3)
    return ("…" if start else "") + short(text[start : start + 2 * EXCERPT])
