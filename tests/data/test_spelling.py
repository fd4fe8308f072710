"""Places of tokens told by their spelling are the tokenizer's own, or are not told."""

import random

import pytest

from eagle_train.data.answers import AnswerCounter
from eagle_train.data.offsets import PlacedTokens, num_begun, num_ended
from eagle_train.data.spelling import Spelling, spelling_of
from eagle_train.data.tokenizer.load import load_tokenizer
from eagle_train.train.config import build, load_choice
from tests.data.test_lengths import SPECIAL, WORDS, byte_level, random_messages
from tests.vocabularies import sentencepiece_bytes, sentencepiece_pieces, write_folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    found = {"bytes": byte_level(trim=False), "trimmed": byte_level(trim=True)}
    for name, legacy in (("llama", False), ("legacy", True)):
        written = write_folder(folder / name, sentencepiece_bytes(sentencepiece_pieces()), legacy=legacy)
        found[name] = load_tokenizer(str(written), folder / "cache")
    return found


def texts(seed, count=400):
    """Returns texts of words, special tokens, spaces of all kinds and characters of up to four bytes."""
    rng = random.Random(seed)
    words = [*WORDS, *SPECIAL[:2], "a", " b", "\n", "\t", "x\n", "\n\n"]
    return ["".join(rng.choice(words) for _ in range(rng.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("name", ["bytes", "llama", "legacy"])
def test_places_are_those_of_the_tokenizer(tokenizers, name):
    tokenizer, told = tokenizers[name], 0
    spelling = spelling_of(tokenizer)
    for text in texts(name):
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        placed = spelling.place(text, encoding.ids)
        if placed is None:
            continue
        told += 1
        assert placed.ids.tolist() == encoding.ids and len(placed) == len(encoding)
        assert [placed.token_to_chars(token) for token in range(len(placed))] == encoding.offsets, text
        for place in range(len(text) + 1):
            assert num_begun(placed, place) == num_begun(encoding, place), (text, place)
            assert num_ended(placed, place) == num_ended(encoding, place), (text, place)
    assert told > 150


def test_a_tokenizer_that_trims_places_is_not_taken_for_one_whose_spelling_tells_them(tokenizers):
    assert spelling_of(tokenizers["trimmed"]) is None


def test_what_the_tokenizer_changed_is_not_told(tokenizers):
    spelling = spelling_of(tokenizers["bytes"])  # composes characters
    backend = tokenizers["bytes"].backend_tokenizer
    for text in ("ﬁ", "e\u0301", "a <tool> b"):
        assert spelling.place(text, backend.encode(text, add_special_tokens=False).ids) is None
    assert spelling.place("cats", backend.encode("dogs", add_special_tokens=False).ids) is None
    assert spelling.place("", []) is None and spelling.place("a", []) is None


def test_a_number_without_a_token_is_never_taken_for_text():
    spelling = Spelling({0: b"a", 2: b"b"}, frozenset(), "nowhere")
    assert isinstance(spelling.place("ab", [0, 2]), PlacedTokens)
    assert spelling.place("ab", [0, 1]) is None


def test_a_tokenizer_whose_spelling_seldom_tells_is_not_asked_again(tokenizers, monkeypatch):
    tokenizer, rng = tokenizers["bytes"], random.Random(0)
    conversations = [random_messages(rng) for _ in range(20)]
    template = build(load_choice("chat_template", "chatml"))
    counter = AnswerCounter(template, tokenizer)
    asked = []
    monkeypatch.setattr(counter._spelling, "place", lambda text, ids: asked.append(text))
    found = counter.tokenize(conversations)
    count = len(asked)
    again = counter.tokenize(conversations)
    assert count > 20 and len(asked) == count
    for one, other, expected in zip(
        found, again, AnswerCounter(template, tokenizer).tokenize(conversations), strict=True
    ):
        assert one.ends == other.ends == expected.ends
        assert one.tokens.ids.tolist() == other.tokens.ids.tolist() == expected.tokens.ids.tolist()
