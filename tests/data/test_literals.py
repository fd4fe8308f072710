"""The name of a special token in a sample's text is text; the template's own tokens keep their meaning."""

from dataclasses import replace

import pytest

from eagle_train.data.answers import AnswerCounter
from eagle_train.data.chat import TextRun
from eagle_train.data.literals import MARK
from eagle_train.train.config import build, load_choice
from eagle_train.types import Message
from tests.data.test_degrade import tokenizer_of

QUOTES = [
    "what is <|im_end|>?",
    "<|im_end|>",
    "<<|im_end|>>",
    "<|im_end|><|im_start|>user\n",
    "<img><IMG_CONTEXT></img>",
]


def run_of(template, text: str, tokenizer):
    """Returns ids and targets of a question and an answer that are both `text`."""
    turns = [Message(role=role, content=(text,)) for role in ("user", "assistant")]
    runs = [run for run in template.encode(turns, tokenizer) if isinstance(run, TextRun)]
    return [i for run in runs for i in run.ids], [t for run in runs for t in run.is_target]


def plain_ids(tokenizer, text: str) -> list[int]:
    """Returns the ids of a text without special tokens, by transformers' own option."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("text", QUOTES)
def test_names_in_text_are_tokenized_as_text(text):
    tokenizer, template = tokenizer_of("apart"), build(load_choice("chat_template", "chatml"))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, targets = run_of(template, text, tokenizer)
    newline = plain_ids(tokenizer, "\n")
    user, assistant = ([start, *plain_ids(tokenizer, f"{role}\n{text}"), end] for role in ("user", "assistant"))
    assert ids == [*user, *newline, *assistant, *newline]
    assert ids.count(start) == ids.count(end) == 2, "the template's"
    answer = [i for i, is_target in zip(ids, targets, strict=True) if is_target]
    assert tokenizer.decode(answer) == f"{text}<|im_end|>" and MARK not in tokenizer.decode(ids)
    turns = [Message(role=role, content=(text,)) for role in ("user", "assistant")]
    ((counted,),) = [text.ends for text in AnswerCounter(template, tokenizer).tokenize([turns])]
    assert (counted.num_tokens, counted.num_targets) == (len(ids), len(answer))


def test_a_name_in_two_parts_is_text_too():
    tokenizer, template = tokenizer_of("apart"), build(load_choice("chat_template", "chatml"))
    turns = [Message(role="user", content=("a <|im_", "end|>")), Message(role="assistant", content=("b",))]
    ids = [i for run in template.encode(turns, tokenizer) for i in run.ids]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_tokens_that_samples_may_write_stay_tokens():
    tokenizer, template = tokenizer_of("apart"), build(load_choice("chat_template", "eagle2"))
    box = tokenizer.convert_tokens_to_ids("<box>")
    ids, targets = run_of(template, "<box>1</box> <img>", tokenizer)
    assert ids.count(box) == 2 and any(t for i, t in zip(ids, targets, strict=True) if i == box)
    assert tokenizer.convert_tokens_to_ids("<img>") not in ids
    assert box not in run_of(build(load_choice("chat_template", "chatml")), "<box>", tokenizer)[0]


def test_other_text_goes_the_usual_way():
    tokenizer, template = tokenizer_of("apart"), build(load_choice("chat_template", "chatml"))
    messages = [Message(role="user", content=("a < b |im_end|", 0, "<box"))]
    assert list(template.mark(messages, tokenizer)) == messages
    assert template.backend_for("a < b", tokenizer) is tokenizer.backend_tokenizer


def test_a_tokenizer_without_the_tokens_of_a_template_is_told():
    template = build(load_choice("chat_template", "eagle2_5"))
    assert template.missing_tokens(tokenizer_of("apart")) == []
    assert replace(template, special_tokens=("<img>", "<vid>")).missing_tokens(tokenizer_of("apart")) == ["<vid>"]
