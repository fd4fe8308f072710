"""The toy tokenizer: any text survives it, special tokens keep their ids, training repeats."""

import random

import pytest
from transformers import AutoTokenizer

from eagle_train.data.toy.conversations import iter_texts
from eagle_train.data.toy.samples import toy_samples
from eagle_train.data.toy.tokenizer import train_tokenizer

SPECIAL = ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def toy_texts():
    for kind in ("text", "shapes"):
        yield from iter_texts(record for _, record, _ in toy_samples(kind, "train", 100, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(toy_texts(), out, vocab_size=512, special_tokens=SPECIAL)
    return out


def test_texts_of_records_are_questions_and_answers():
    (sample,) = toy_samples("shapes", "train", 1, 0)
    texts = list(iter_texts([sample[1]]))
    assert len(texts) == len(sample[1]["messages"]) and all(isinstance(text, str) for text in texts)


def test_any_unicode_text_round_trips(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    texts = [
        "",
        " two  spaces ",
        "line\nbreak\t",
        "don 't ,  stop .",
        "Größe 漢字 👩‍👩‍👧 e\u0301 \u0000 \u200b",
        "12 345",
    ]
    for _ in range(200):
        points = [p for p in (rng.randrange(0x110000) for _ in range(20)) if not 0xD800 <= p < 0xE000]
        texts.append("".join(map(chr, points)))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_are_single_and_first(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(len(SPECIAL)))
    assert tokenizer.encode("".join(SPECIAL)) == list(range(len(SPECIAL)))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<|end|>")
    assert set(tokenizer.all_special_tokens) == set(SPECIAL)


def test_common_words_are_one_token_and_digits_stay_single(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 512
    assert len(tokenizer.encode("What colour is the background?")) <= 7
    assert len(tokenizer.encode("4711")) == 4


def test_training_twice_gives_equal_files(folder, tmp_path):
    train_tokenizer(toy_texts(), tmp_path, vocab_size=512, special_tokens=SPECIAL)
    names = sorted(path.name for path in folder.iterdir())
    assert "tokenizer.json" in names and names == sorted(path.name for path in tmp_path.iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_impossible_vocabularies_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size 260 .* give >= 261"):
        train_tokenizer([], tmp_path, vocab_size=260, special_tokens=SPECIAL)
    with pytest.raises(ValueError, match="must be unique and name <pad>"):
        train_tokenizer([], tmp_path, vocab_size=512, special_tokens=["<pad>"])
    assert not list(tmp_path.iterdir())
