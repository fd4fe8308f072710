"""Reading annotations record by record: what `json.load` gives, with little in memory."""

import json
import random

import pytest

from eagle_train.data import annotations
from eagle_train.data.annotations import read_annotation


def entries(seed, count):
    rng = random.Random(seed)
    kinds = [
        lambda: {"id": rng.randrange(10**9), "text": ']}",é\\ \u4e2d' * rng.randrange(4), "list": [1, [2, {}]]},
        lambda: rng.randrange(-(10**6), 10**6),
        lambda: rng.random() * 1e-7,
        lambda: rng.choice([None, True, False, "", "]", [], {}]),
    ]
    return [rng.choice(kinds)() for _ in range(count)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_as_json_load_reads_it(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(annotations, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.json"
    for seed, count in enumerate([0, 1, 2, 40]):
        expected = entries(seed, count)
        text = json.dumps(expected, indent=indent, ensure_ascii=seed % 2 == 0)
        path.write_bytes(b"\xef\xbb\xbf \n"[3 * (seed % 2) :] + text.encode() + b"\n")
        assert list(read_annotation(path)) == expected


def test_a_record_is_given_before_the_file_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + ",".join(json.dumps({"id": i, "text": "x" * 1000}) for i in range(5000)))  # never ends
    records = read_annotation(path)
    assert next(records)["id"] == 0
    with pytest.raises(ValueError, match="not a whole JSON list"):
        list(records)


@pytest.mark.parametrize(
    "text", ["[1, 2", "[1 2]", "[1,]", "[", "[,1]", '[{"a": }]', "[1] 2", "[1], [2]", '["a]', "[1, tru]", "[" * 9999]
)
def test_a_broken_list_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not a whole JSON list"):
        list(read_annotation(path))


def test_an_entry_longer_than_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "CHUNK_BYTES", 16)
    monkeypatch.setattr(annotations, "MAX_RECORD_CHARS", 100)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["x" * 1000, 1]))
    with pytest.raises(ValueError, match="not a whole JSON list"):
        list(read_annotation(path))


def test_lines_are_given_as_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf[1]\n\n  \n{"a": 1}\nbroken\n')
    assert list(read_annotation(path)) == [b"[1]\n", b'{"a": 1}\n', b"broken\n"]
