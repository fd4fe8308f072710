"""Published vocabularies give the published ids. Needs the files: EAGLE_TRAIN_TEST_DATA names their folder.

It holds `tokenizers/<name>/` (Llama 2, Vicuna 1.5 and Llama 3 with `tokenizer.model`, Qwen 2.5) and `oracles/`:
llama.cpp's `ggml-vocab-*.gguf.inp` and `.out`, ids of transformers' tests, and TRL's masks.
"""

import functools
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import regex

from eagle_train.data.chat import TextRun
from eagle_train.data.tokenizer.load import load_tokenizer
from eagle_train.data.tokenizer.sentencepiece import read_sentencepiece
from eagle_train.data.tokenizer.tiktoken import LLAMA3_SPLIT, byte_characters, read_tiktoken
from eagle_train.train.config import build, load_choice
from eagle_train.types import Message
from tests.vocabularies import SlowLlama, tiktoken_split

DATA = os.environ.get("EAGLE_TRAIN_TEST_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None, reason="EAGLE_TRAIN_TEST_DATA names no folder of vocabularies"),
]
VOCABULARIES = [("llama2", "llama-spm"), ("vicuna-7b-v1.5", "llama-spm"), ("llama3", "llama-bpe"), ("qwen2.5", "qwen2")]
SEPARATOR = "\n__ggml_vocab_test__\n"
# Vicuna 1.5's ids of Eagle's prompt about an image, and of the answer "Yes.", worked out by hand from the vocabulary.
BEGIN = [1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892]
BEGIN += [13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 29871]
QUESTION = [29871, 13, 5618, 338, 445, 29973, 319, 1799, 9047, 13566, 29901]
ANSWER = [3869, 29889, 2]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Returns the tokenizer of a name."""
    cache = tmp_path_factory.mktemp("cache")
    return functools.cache(lambda name: load_tokenizer(str(folder(name)), cache))


def folder(name):
    return Path(DATA) / "tokenizers" / name


@pytest.mark.parametrize(("name", "oracle"), VOCABULARIES)
def test_all_47_published_cases(name, oracle, load):
    tokenizer = load(name)
    path = Path(DATA) / "oracles" / "ggml_vocab" / f"ggml-vocab-{oracle}.gguf"
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split(SEPARATOR)
    lines = path.with_suffix(".gguf.out").read_text().split("\n")[: len(texts)]
    assert len(texts) == 47
    wrong = [t for t, line in zip(texts, lines, strict=True) if ids_of(tokenizer, t) != list(map(int, line.split()))]
    assert not wrong


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["llama2", "vicuna-7b-v1.5", "qwen2.5"])
def test_the_cases_of_transformers(name, load):
    tokenizer = load(name)
    cases = json.loads((Path(DATA) / "oracles" / "hf_tokenizer_expectations.json").read_text())["cases"]
    mine = [case for case in cases if case["tokenizer"] == ("qwen2.5" if name == "qwen2.5" else "llama")]
    assert len(mine) >= 3
    for case in mine:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


def random_texts(characters, count=400):
    rng = random.Random(0)
    runs = [" ", "  ", "\n", "=", "-", "a", "1", "the ", "日本", "🦙", "//", "é"]
    for _ in range(count):
        yield "".join(rng.choice(runs) for _ in range(rng.randrange(1, 50)))
        yield "".join(rng.choice(characters) for _ in range(rng.randrange(1, 20))).replace("▁", " ")


@pytest.mark.parametrize("name", ["llama2", "vicuna-7b-v1.5"])
def test_random_texts_are_split_as_sentencepiece_splits_them(name, load):
    model = read_sentencepiece((folder(name) / "tokenizer.model").read_bytes())
    slow = SlowLlama([(p.text, p.score, p.kind) for p in model.pieces], legacy=name == "llama2")
    tokenizer = load(name)
    for text in random_texts(model.mergeable()):
        assert ids_of(tokenizer, text) == slow(text), repr(text)


def test_random_texts_are_split_as_tiktoken_splits_them(load):
    pieces = read_tiktoken((folder("llama3") / "tokenizer.model").read_bytes())
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    ranks = {bytes(byte_of[character] for character in piece): rank for rank, piece in enumerate(pieces)}
    words = [piece.decode() for piece in ranks if b"\xff" not in piece and piece.isascii()]
    tokenizer = load("llama3")
    for text in random_texts(words):
        wanted = [i for word in regex.findall(LLAMA3_SPLIT, text) for i in tiktoken_split(word.encode(), ranks)]
        assert ids_of(tokenizer, text) == wanted, repr(text)


def template_of(name):
    return build(load_choice("chat_template", name))


def encoded(template, messages, tokenizer):
    ids, targets = [], []
    for item in template.encode(messages, tokenizer):
        ids += item.ids.tolist() if isinstance(item, TextRun) else [-200]
        targets += item.is_target.tolist() if isinstance(item, TextRun) else [False]
    return ids, targets


def test_vicunas_prompt_with_an_image(load):
    tokenizer = load("vicuna-7b-v1.5")
    messages = (Message(role="user", content=(0, "What is this?")), Message(role="assistant", content=("Yes.",)))
    ids, targets = encoded(template_of("vicuna_v1"), messages, tokenizer)
    assert ids == [*BEGIN, -200, *QUESTION, *ANSWER]
    assert targets == [False] * (len(ids) - len(ANSWER)) + [True] * len(ANSWER)
    second = (Message(role="user", content=("A",)), Message(role="assistant", content=("B",)))
    more, _ = encoded(template_of("vicuna_v1"), messages + second, tokenizer)
    assert more == [*ids, 11889, 29901, 319, 319, 1799, 9047, 13566, 29901, 350, 2], "USER is one token behind </s>"


def test_vicunas_caption(load):
    tokenizer = load("vicuna-7b-v1.5")
    messages = (Message(role="user", content=(0, "Describe.")), Message(role="assistant", content=("a dog",)))
    assert encoded(template_of("plain"), messages, tokenizer) == (
        [1, -200, 263, 11203, 13],
        [False, False, True, True, True],
    )


def test_llama3s_prompt_begins_twice_under_parity(load):
    tokenizer = load("llama3")
    messages = (Message(role="user", content=("Hi",)), Message(role="assistant", content=("Yes.",)))
    system = [128006, 9125, 128007, 271, 32, 6369]  # "A chat", and so on
    turns = [128009, 128006, 882, 128007, 271, 13347, 128009, 128006, 78191, 128007, 271, 9642, 13, 128009]
    for name, begins in (("llama3_parity", 2), ("llama3_better", 1)):
        ids, targets = encoded(template_of(name), messages, tokenizer)
        assert ids[: begins + len(system)] == [128000] * begins + system and ids[-len(turns) :] == turns
        assert [i for i, t in zip(ids, targets, strict=True) if t] == turns[-3:]


def test_masks_of_trl_for_qwen(load):
    tokenizer = load("qwen2.5")
    cases = json.loads((Path(DATA) / "oracles" / "derived_qwen2.5_assistant_masks.json").read_text())["cases"]
    assert len(cases) == 13
    ours = template_of("chatml")
    # TRL trains the newlines on both sides of an answer too.
    theirs = replace(
        ours,
        prefix=dict(ours.prefix) | {"assistant": "<|im_start|>assistant"},
        answer_prefix="\n",
        suffix={role: f"{text}\n" for role, text in ours.suffix.items()},
        separator="",
        system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    )
    for case in cases:
        messages = messages_of(case)
        ids, targets = encoded(theirs, messages, tokenizer)
        assert ids == case["input_ids"]
        assert targets == list(map(bool, case["assistant_mask"]))
        same, fewer = encoded(replace(ours, system=theirs.system), messages, tokenizer)
        assert same == ids
        assert sum(targets) - sum(fewer) == 2 * sum(message.role == "assistant" for message in messages)


def messages_of(case):
    return [Message(role=message["role"], content=(message["content"],)) for message in case["messages"]]


def test_masks_of_trl_for_llama3(load):
    tokenizer = load("llama3")
    jinja = (Path(DATA) / "tokenizers" / "chat_templates" / "llama3_training.jinja").read_text()
    cases = json.loads((Path(DATA) / "oracles" / "derived_qwen2.5_assistant_masks.json").read_text())["cases"]
    for case in cases:
        wanted = tokenizer.apply_chat_template(
            case["messages"], chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, targets = encoded(template_of("llama3"), messages_of(case), tokenizer)
        assert ids == wanted["input_ids"] and targets == list(map(bool, wanted["assistant_masks"]))
