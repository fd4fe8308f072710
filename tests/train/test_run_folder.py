"""The records of a run's starts."""

import errno
import json
from pathlib import Path

import pytest

from eagle_train.track.jsonl import read_metrics
from eagle_train.train.run_folder import ATTEMPTS, first_run_id, read_attempts, record_attempt


@pytest.mark.parametrize("torn", ["", "{", '{"attempt": 2, "run_id": "other"}', "\0" * 9, "{\n"])
def test_a_start_that_was_killed_while_it_was_written_down_does_not_count(tmp_path, torn):
    assert [record_attempt(tmp_path, "a: 1", "first", None) for _ in range(2)] == [0, 1]
    whole = (tmp_path / ATTEMPTS).read_bytes()
    with (tmp_path / ATTEMPTS).open("a") as file:
        file.write(torn)
    assert first_run_id(tmp_path) == "first" and len(read_attempts(tmp_path)) == 2
    assert record_attempt(tmp_path, "a: 1", "first", tmp_path / "step-00000005") == 2
    assert (tmp_path / ATTEMPTS).read_bytes().startswith(whole)
    starts = read_metrics(tmp_path / ATTEMPTS)
    assert starts == read_attempts(tmp_path) and [start["attempt"] for start in starts] == [0, 1, 2]
    assert [start["resumed_from"] for start in starts] == [None, None, "step-00000005"]


@pytest.mark.parametrize("left", [None, "", '{"attempt": 0, "run_'])
def test_the_first_start_begins_the_record(tmp_path, left):
    if left is not None:
        (tmp_path / ATTEMPTS).write_text(left)
    assert first_run_id(tmp_path) is None
    assert record_attempt(tmp_path, "a: 1", "first", None) == 0
    (start,) = map(json.loads, (tmp_path / ATTEMPTS).read_text().splitlines())
    assert start["run_id"] == "first" and (tmp_path / "config.yaml").read_text() == "a: 1"


def test_a_start_that_cannot_write_leaves_the_config_of_the_one_before(tmp_path, monkeypatch):
    record_attempt(tmp_path, "a: 1", "first", None)
    with monkeypatch.context() as patch:

        def full(path, text):
            path.write_bytes(b"")  # as `write_text` does: it opens, and then there is no room
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            record_attempt(tmp_path, "a: 2", "first", None)
    assert (tmp_path / "config.yaml").read_text() == "a: 1" and len(read_attempts(tmp_path)) == 1
    record_attempt(tmp_path, "a: 2", "first", None)
    assert (tmp_path / "config.yaml").read_text() == "a: 2"
    assert sorted(path.name for path in tmp_path.iterdir()) == [ATTEMPTS, "config.yaml"]


def test_a_record_that_is_damaged_elsewhere_is_refused_with_its_line(tmp_path):
    record_attempt(tmp_path, "a: 1", "first", None)
    whole = (tmp_path / ATTEMPTS).read_bytes()
    (tmp_path / ATTEMPTS).write_bytes(b"{\n" + whole)
    with pytest.raises(ValueError, match=r"attempts\.jsonl: line 1 of 2 is not JSON .*; delete it to go on"):
        record_attempt(tmp_path, "a: 1", "first", None)
