"""Records, templates and tokenizers together give the ids and targets that Eagle 1 trained on."""

import re

import pytest
import regex

from eagle_train.data.chat import ChatTemplate, TextRun
from eagle_train.data.schemas import parse_record
from eagle_train.data.tokenizer.load import load_tokenizer
from eagle_train.data.tokenizer.tiktoken import LLAMA3_SPLIT
from eagle_train.train.config import build, load_choice
from tests.vocabularies import (
    TEXT,
    SlowLlama,
    learn_pieces,
    sentencepiece_bytes,
    sentencepiece_pieces,
    tiktoken_bytes,
    tiktoken_split,
    write_folder,
)

IMAGE = -200
SENTENCE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHATS = [
    [("<image>\nWhat is in the picture?", "Two cats"), ("And    dogs?", " three dogs.\n"), ("a", "\n12345")],
    [("What is in the picture?\n<image>", "été 🦙"), ("system", "▁日")],
    [("<image>", "def f(x):\n    return x")],
    [("in <image> the picture", "  Two")],
    [("no picture", "Two cats"), (" polite answers ", "three")],
]
CAPTIONS = ["Two cats", " a picture", "  cats", "été 🦙"]


def template_of(name: str) -> ChatTemplate:
    return build(load_choice("chat_template", name))


def record_of(chat) -> dict:
    turns = [{"from": who, "value": text} for turn in chat for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"conversations": turns} | ({"image": "a.jpg"} if any("<image>" in text for text, _ in chat) else {})


def ours(name, chat, tokenizer) -> tuple[list[int], list[bool]]:
    """Returns ids and targets by this project, IMAGE where an image stands."""
    ids, targets = [], []
    for item in template_of(name).encode(parse_record(record_of(chat), key="k").messages, tokenizer):
        ids += item.ids.tolist() if isinstance(item, TextRun) else [IMAGE]
        targets += item.is_target.tolist() if isinstance(item, TextRun) else [False]
    return ids, targets


def theirs(prompt: str, answers: list[tuple[int, int]], slow, begin: list[int]) -> tuple[list[int], list[bool]]:
    """Returns ids and targets by the published rules, from the whole prompt as one string.

    Every piece around `<image>` is tokenized on its own; the begin token stands once, in front.

    Args:
        answers: characters [start, end) that are learnt, each within one piece.
    """
    ids, targets, place = list(begin), [False] * len(begin), 0
    for number, piece in enumerate(prompt.split("<image>")):
        if number:
            ids, targets, place = [*ids, IMAGE], [*targets, False], place + len("<image>")
        learnt = [False] * len(slow(piece))
        for start, end in answers:
            if place <= start and end <= place + len(piece):
                first, last = len(slow(piece[: start - place])), len(slow(piece[: end - place]))
                learnt[first:last] = [True] * (last - first)
        ids, targets, place = ids + slow(piece), targets + learnt, place + len(piece)
    return ids, targets


def with_image_first(text: str) -> str:
    """Returns a turn as the published preprocessing leaves it."""
    return f"<image>\n{text.replace('<image>', '').strip()}".strip() if "<image>" in text else text


def prompt_of(chat, system, user, assistant, end) -> tuple[str, list[tuple[int, int]]]:
    """Returns a prompt, and where its answers are; `user` and `assistant` are formats of a turn."""
    prompt, answers = system, []
    for question, answer in chat:
        prompt += user.format(with_image_first(question)) + assistant
        answers.append((len(prompt), len(prompt + answer + end)))
        prompt += answer + end
    return prompt, answers


@pytest.mark.parametrize("chat", CHATS)
def test_vicuna(tmp_path, chat):
    pieces = sentencepiece_pieces()
    tokenizer = load_tokenizer(
        str(write_folder(tmp_path / "a", sentencepiece_bytes(pieces), legacy=False)), tmp_path / "cache"
    )
    prompt, answers = prompt_of(chat, f"{SENTENCE} ", "USER: {} ", "ASSISTANT: ", "</s>")
    answers = [(start - 1, end) for start, end in answers]  # the space and the first word are one token
    assert ours("vicuna_v1", chat, tokenizer) == theirs(prompt, answers, SlowLlama(pieces, legacy=False), [1])


@pytest.mark.parametrize("chat", CHATS)
def test_yi(tmp_path, chat):
    own = ("<|im_start|>", "<|im_end|>")
    pieces = sentencepiece_pieces(own)
    listed = {str(3 + place): {"content": text, "special": True} for place, text in enumerate(own)}
    vocabulary = sentencepiece_bytes(pieces, prefix=False)
    config = {"add_bos_token": False, "legacy": True, "eos_token": "<|im_end|>"}
    folder = write_folder(tmp_path / "a", vocabulary, added_tokens_decoder=listed, **config)
    tokenizer = load_tokenizer(str(folder), tmp_path / "cache")
    slow = SlowLlama(pieces, legacy=True, prefix=False, special=(*own, "<s>", "</s>", "<unk>"))
    start, end = own
    system = f"{start}system\nAnswer the questions.{end}"
    prompt, answers = prompt_of(chat, system, f"{start}user\n{{}}{end}", f"{start}assistant\n", end)
    assert ours("yi_chatml", chat, tokenizer) == theirs(prompt, answers, slow, [])


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(("name", "begins"), [("llama3_parity", 2), ("llama3_better", 1)])
def test_llama3(tmp_path, chat, name, begins):
    pieces = [*(bytes([byte]) for byte in range(256)), *(p.encode() for p in learn_pieces(TEXT) if len(p) > 1)]
    pieces = list(dict.fromkeys(pieces))
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special = {text: len(pieces) + place for place, text in enumerate(names)}
    listed = {str(index): {"content": text} for text, index in special.items()}
    config = {"bos_token": names[0], "eos_token": names[3], "unk_token": None, "added_tokens_decoder": listed}
    tokenizer = load_tokenizer(str(write_folder(tmp_path / "a", tiktoken_bytes(pieces), **config)), tmp_path / "cache")
    ranks = {piece: rank for rank, piece in enumerate(pieces)}

    def slow(text: str) -> list[int]:
        parts = re.split(r"(<\|\w+\|>)", text)
        return [
            index
            for part in parts
            for index in (
                [special[part]]
                if part in special
                else [i for word in regex.findall(LLAMA3_SPLIT, part) for i in tiktoken_split(word.encode(), ranks)]
            )
        ]

    def header(role: str) -> str:
        return f"{names[1]}{role}{names[2]}\n\n"

    system = f"{names[0]}{header('system')}{SENTENCE}{names[3]}"
    prompt, answers = prompt_of(chat, system, f"{header('user')}{{}}{names[3]}", header("assistant"), names[3])
    begin = [special[names[0]]] * (begins - 1)
    assert ours(name, chat, tokenizer) == theirs(prompt, answers, slow, begin)


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("legacy", [True, False])
def test_plain(tmp_path, caption, legacy):
    pieces = sentencepiece_pieces()
    folder = write_folder(tmp_path / "a", sentencepiece_bytes(pieces), legacy=legacy)
    tokenizer = load_tokenizer(str(folder), tmp_path / "cache")
    prompt = f"<image>{caption}\n"
    wanted = theirs(prompt, [(len("<image>"), len(prompt))], SlowLlama(pieces, legacy=legacy), [1])
    assert ours("plain", [("Give a caption.\n<image>", caption)], tokenizer) == wanted


def test_plain_puts_no_begin_token_where_the_tokenizer_does_not(tmp_path):
    folder = write_folder(tmp_path / "a", sentencepiece_bytes(sentencepiece_pieces()), add_bos_token=False)
    ids, _ = ours("plain", [("<image>", "Two cats")], load_tokenizer(str(folder), tmp_path / "cache"))
    assert ids[0] == IMAGE
