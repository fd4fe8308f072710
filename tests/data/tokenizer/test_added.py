"""Special tokens that are added to a tokenizer have ids of their own, in memory and in the files that are written."""

import json

import pytest
from transformers import AutoTokenizer

from eagle_train.data.tokenizer.added import add_special_tokens, write_tokenizer
from eagle_train.data.tokenizer.load import load_tokenizer
from tests.vocabularies import sentencepiece_bytes, sentencepiece_pieces, write_folder

NEW = ["<img>", "</img>", "<IMG_CONTEXT>"]


@pytest.fixture(params=["tokenizer.json", "tokenizer.model"])
def source(request, data, tmp_path):
    if request.param == "tokenizer.json":
        return data / "tokenizer"
    return write_folder(tmp_path / "llama", sentencepiece_bytes(sentencepiece_pieces()))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_new_tokens_follow_the_others_and_are_found_inside_text(source, tmp_path):
    tokenizer = load_tokenizer(str(source), tmp_path / "cache")
    known = len(tokenizer)
    assert add_special_tokens(tokenizer, NEW) == 3
    assert tokenizer.convert_tokens_to_ids(NEW) == [known, known + 1, known + 2]
    ids = tokenizer.encode("a<img><IMG_CONTEXT><IMG_CONTEXT></img>b", add_special_tokens=False)
    assert [i for i in ids if i >= known] == [known, known + 2, known + 2, known + 1]
    assert add_special_tokens(tokenizer, ["<img>", "<box>"]) == 1, "it has the first"
    assert tokenizer.convert_tokens_to_ids(["<img>", "<box>"]) == [known, known + 3]


def test_written_files_give_the_same_ids(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(str(source), NEW, out)
    expected = load_tokenizer(str(source), tmp_path / "cache")
    add_special_tokens(expected, NEW)
    text = "What is in <img><IMG_CONTEXT></img> the picture?"
    ids = expected.encode(text, add_special_tokens=False)
    assert load_tokenizer(str(out), tmp_path / "cache").encode(text, add_special_tokens=False) == ids
    config = json.loads((out / "tokenizer_config.json").read_text())
    added = {token["content"]: int(index) for index, token in config["added_tokens_decoder"].items()}
    assert [added[token] for token in NEW] == expected.convert_tokens_to_ids(NEW)
    assert config["additional_special_tokens"][-3:] == NEW
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.convert_tokens_to_ids(NEW) == expected.convert_tokens_to_ids(NEW)
    assert theirs.decode(theirs.convert_tokens_to_ids(NEW), skip_special_tokens=True) == ""


def test_files_are_copied_as_they_are_where_nothing_is_new(data, tmp_path):
    for name, new in (("none", []), ("known", ["<|user|>"])):
        (tmp_path / name).mkdir()
        write_tokenizer(str(data / "tokenizer"), new, tmp_path / name)
        for path in (tmp_path / name).iterdir():
            assert path.read_bytes() == (data / "tokenizer" / path.name).read_bytes()
