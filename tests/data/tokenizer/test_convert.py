"""A converted vocabulary gives the ids of the slow tokenizer that its model was trained with."""

import json
import random

import pytest
import regex
from transformers import PreTrainedTokenizerFast

from eagle_train.data.tokenizer.convert import convert
from eagle_train.data.tokenizer.load import converted, load_tokenizer
from eagle_train.data.tokenizer.merges import pair_merges
from eagle_train.data.tokenizer.sentencepiece import read_sentencepiece
from eagle_train.data.tokenizer.tiktoken import LLAMA3_SPLIT, is_tiktoken, read_tiktoken
from eagle_train.train import assemble
from eagle_train.train.config import ConfigError
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

PARTS = (
    " ",
    "  ",
    "   ",
    "\n",
    "a",
    "aa",
    "USER",
    "the ",
    "=",
    "==",
    "12",
    "é",
    "日",
    "🦙",
    "▁",
    "</s>",
    "<s>",
    "cats",
)


def random_texts(count=150, parts=PARTS):
    rng = random.Random(0)
    made = ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 16))) for _ in range(count)]
    places = [rng.randrange(len(TEXT) - 60) for _ in range(count)]
    return [*made, *(TEXT[place : place + rng.randrange(1, 60)] for place in places)]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_model_gives_the_slow_tokenizers_ids(tmp_path, legacy, prefix):
    pieces = sentencepiece_pieces()
    tokenizer = convert(write_folder(tmp_path, sentencepiece_bytes(pieces, prefix=prefix), legacy=legacy))
    slow = SlowLlama(pieces, legacy=legacy, prefix=prefix)
    for text in random_texts():
        assert tokenizer.encode(text, add_special_tokens=False).ids == slow(text), repr(text)


def test_the_two_settings_of_legacy_differ_behind_special_tokens_only(tmp_path):
    vocabulary = sentencepiece_bytes(sentencepiece_pieces())
    old, new = (
        convert(write_folder(tmp_path / str(i), vocabulary, legacy=legacy)) for i, legacy in enumerate((True, False))
    )
    for text in ("USER: a", " a", "  a", "\na"):
        assert old.encode(text).ids == new.encode(text).ids
    assert len(old.encode("a</s>USER").ids) == len(new.encode("a</s>USER").ids) + 1


def test_user_defined_pieces_are_found_first_and_never_merge(tmp_path):
    own = ("<|im_start|>", "<|im_end|>", "▁▁▁", "12")
    pieces = [piece for piece in sentencepiece_pieces(own) if piece[2] == 4 or piece[0] not in own]
    texts = random_texts(parts=(*PARTS, *own))
    slow = SlowLlama(pieces, legacy=True, prefix=False)
    tokenizer = convert(write_folder(tmp_path / "a", sentencepiece_bytes(pieces, prefix=False)))
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == slow(text), repr(text)
    with pytest.raises(ValueError, match="user-defined pieces"):
        convert(write_folder(tmp_path / "b", sentencepiece_bytes(pieces)))
    listed = {str(3 + place): {"content": text} for place, text in enumerate(own)}
    assert convert(write_folder(tmp_path / "b", sentencepiece_bytes(pieces), added_tokens_decoder=listed))


def test_what_is_decoded_is_the_text(tmp_path):
    folder = write_folder(tmp_path / "a", sentencepiece_bytes(sentencepiece_pieces()), legacy=False)
    tokenizer = load_tokenizer(str(folder), tmp_path / "cache")
    for text in ("Two cats", "  été 🦙\n", "a"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_a_begin_token_is_put_before_a_text_where_the_config_asks_for_it(tmp_path):
    vocabulary = sentencepiece_bytes(sentencepiece_pieces())
    assert convert(write_folder(tmp_path / "a", vocabulary)).encode("").ids == [1]
    assert convert(write_folder(tmp_path / "b", vocabulary, add_bos_token=False)).encode("").ids == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": 1}, "'model_type': 1"),
        ({"byte_fallback": 0}, "'byte_fallback': 0"),
        ({"remove_extra_whitespaces": 1}, "'remove_extra_whitespaces': 1"),
    ],
)
def test_a_model_that_works_otherwise_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        read_sentencepiece(sentencepiece_bytes(sentencepiece_pieces(), **changes))


@pytest.mark.parametrize("data", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256))])
def test_what_is_no_model_is_refused(data):
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        read_sentencepiece(data)


def test_a_torn_model_is_refused():
    data = sentencepiece_bytes(sentencepiece_pieces())
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        read_sentencepiece(data[:-100])


def test_an_id_that_the_vocabulary_does_not_have_is_refused(tmp_path):
    listed = {"9": {"content": "</s>"}}
    with pytest.raises(ValueError, match=r"'</s>' has id 9 in the config, 2 in the vocabulary"):
        convert(write_folder(tmp_path, sentencepiece_bytes(sentencepiece_pieces()), added_tokens_decoder=listed))


def tiktoken_pieces():
    learnt = [piece.encode() for piece in learn_pieces(TEXT.replace("\n", "~")) if len(piece) > 1]
    return [*(bytes([byte]) for byte in range(256)), *learnt]


def test_a_tiktoken_vocabulary_gives_tiktokens_ids(tmp_path):
    pieces = tiktoken_pieces()
    listed = {str(len(pieces)): {"content": "<|begin_of_text|>"}, str(len(pieces) + 1): {"content": "<|eot_id|>"}}
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "unk_token": None}
    folder = write_folder(tmp_path, tiktoken_bytes(pieces), added_tokens_decoder=listed, **config)
    tokenizer = convert(folder)
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    for text in random_texts():
        words = regex.findall(LLAMA3_SPLIT, text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == [
            index for word in words for index in tiktoken_split(word.encode(), ranks)
        ]
    assert tokenizer.encode("a<|eot_id|>").ids == [len(pieces), ord("a"), len(pieces) + 1]


def test_a_tiktoken_vocabulary_of_another_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"without <\|begin_of_text\|> is not Llama 3's"):
        convert(write_folder(tmp_path, tiktoken_bytes(tiktoken_pieces())))


def test_a_tiktoken_vocabulary_with_a_lost_line_is_refused():
    lines = tiktoken_bytes(tiktoken_pieces()).splitlines(True)
    assert is_tiktoken(b"".join(lines)) and not is_tiktoken(sentencepiece_bytes(sentencepiece_pieces()))
    with pytest.raises(ValueError, match=r"line 3 is no tiktoken entry \(rank 3 follows 1\)"):
        read_tiktoken(b"".join([*lines[:2], *lines[3:]]))


def test_merges_follow_the_piece_that_they_make():
    assert pair_merges(["ab", "abc", "bc", "a", "b", "c"]) == [("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "vicuna", sentencepiece_bytes(sentencepiece_pieces()), legacy=False)


def test_a_folder_is_converted_once_and_left_as_it_is(folder, tmp_path):
    cache = tmp_path / "cache"
    before = sorted(path.name for path in folder.iterdir())
    first = load_tokenizer(str(folder), cache)
    (made,) = cache.iterdir()
    stamp = (made / "tokenizer.json").stat().st_mtime_ns
    again = load_tokenizer(str(folder), cache)
    assert [path.name for path in cache.iterdir()] == [made.name]
    assert (made / "tokenizer.json").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in folder.iterdir()) == before
    assert first.encode("Two cats") == again.encode("Two cats") == convert(folder).encode("Two cats").ids
    assert (again.bos_token, again.eos_token, again.unk_token, again.pad_token) == ("<s>", "</s>", "<unk>", None)


def test_another_config_makes_another_conversion(folder, tmp_path):
    cache = tmp_path / "cache"
    one = load_tokenizer(str(folder), cache)
    write_folder(folder, (folder / "tokenizer.model").read_bytes(), legacy=True)
    other = load_tokenizer(str(folder), cache)
    assert one.encode("a</s>USER") != other.encode("a</s>USER") and len(list(cache.iterdir())) == 2


def test_a_tokenizer_json_counts_as_it_is_whatever_class_the_config_names(folder, tmp_path):
    load_tokenizer(str(folder), tmp_path / "cache").save_pretrained(tmp_path / "export")
    path = tmp_path / "export" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    exported = load_tokenizer(str(tmp_path / "export"), tmp_path / "unused")
    assert not (tmp_path / "unused").exists()
    for text in ("  a cat", "USER: a</s>USER: b", "\n"):
        assert exported.encode(text) == convert(folder).encode(text).ids


def test_an_unwritable_cache_says_what_to_set(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME to a writable folder"):
        load_tokenizer(str(folder), tmp_path / "file" / "cache")


def test_a_conversion_that_another_process_published_first_is_taken(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    save = PreTrainedTokenizerFast.save_pretrained

    def save_behind_another(self, path):
        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
        converted(folder, cache)
        return save(self, path)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save_behind_another)
    assert load_tokenizer(str(folder), cache).encode("a") == convert(folder).encode("a").ids
    assert len(list(cache.iterdir())) == 1, "nothing is left aside"


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor on the hub"):
        load_tokenizer(str(tmp_path / "nothing"), tmp_path)
    with pytest.raises(ConfigError, match=r"no tokenizer at .*nothing.*set tokenizer=FOLDER"):
        assemble.load_tokenizer(str(tmp_path / "nothing"))


def test_the_app_loads_a_folder_with_a_vocabulary_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    tokenizer = assemble.load_tokenizer(str(folder))
    assert tokenizer.encode("Two cats") == convert(folder).encode("Two cats").ids
    assert len(list((tmp_path / "home" / "eagle_train" / "tokenizers").iterdir())) == 1
    (folder / "tokenizer.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        assemble.load_tokenizer(str(folder))
