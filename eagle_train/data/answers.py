"""How long a conversation is up to the end of each of its answers, and the sample cut there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from eagle_train.data.chat import ChatTemplate, TextRun
from eagle_train.types import Message, Sample


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """A conversation from its start to the end of one of its answers."""

    num_tokens: int
    """Of text; media not counted."""
    num_targets: int
    """Supervised tokens."""
    num_media: int


def answer_ends(
    template: ChatTemplate, messages: Sequence[Message], tokenizer, added_ids: Container[int]
) -> list[AnswerEnd]:
    """Returns what `template.encode` would count for the messages up to each answer, encoding them once.

    Args:
        tokenizer: a fast transformers tokenizer.
        added_ids: its added tokens; the text on either side of one is tokenized independently.
    """
    runs = template.encode(messages, tokenizer)
    ends = []
    for count, message in enumerate(messages, 1):
        if message.role != "assistant":
            continue
        items = template.render(messages[:count])
        num_whole = len(items)  # the start, and what is before the run that is cut
        here = [run for run in runs[:num_whole] if isinstance(run, TextRun)]
        num_characters = sum(len(text) for text, _ in items[-1])
        is_end = count == len(messages)
        last = runs[num_whole] if is_end else first_characters(runs[num_whole], num_characters, added_ids)
        if last is None:
            here = [run for run in template.encode(messages[:count], tokenizer) if isinstance(run, TextRun)]
        else:
            here.append(last)
        num_media = sum(isinstance(item, int) for item in items)
        ends.append(AnswerEnd(sum(len(run.ids) for run in here), sum(sum(run.is_target) for run in here), num_media))
    return ends


def first_characters(run: TextRun, count: int, added_ids: Container[int]) -> TextRun | None:
    """Returns what the first `count` characters of a run's text give on their own; None if that takes encoding them.

    It is known where a token ends there and it or the next one is an added token. So is it for all templates whose
    answers end with one, not for `plain`, whose newline may share a token with what follows.
    """
    place = bisect_left([start for start, _ in run.spans], count)
    if not 0 < place < len(run.ids) or run.spans[place - 1][1] > count:
        return None
    if run.ids[place - 1] not in added_ids and run.ids[place] not in added_ids:
        return None
    return TextRun(run.ids[:place], run.is_target[:place], run.spans[:place])


def first_answers(sample: Sample, count: int) -> Sample:
    """Returns the sample up to its `count`-th answer, with the media of the turns that stay."""
    ends = [place for place, message in enumerate(sample.messages, 1) if message.role == "assistant"]
    messages = sample.messages[: ends[count - 1]]
    num_media = sum(isinstance(part, int) for message in messages for part in message.content)
    return replace(sample, messages=messages, media=sample.media[:num_media])  # media are in reading order
