"""The quarantine list: whole keys, read strictly; what it names is found, what names nothing is reported."""

import numpy as np
import pytest

from eagle_train.data.quarantine import quarantined_rows, read_quarantine, report_unmatched

LIST = (
    "\ufeff# seen in run 3\n\ns/s-000000/a\r\n  s/s-000000/deep/er/b  \n # s/s-0/c\nt/t-000001/a b #1\ns/s-000000/a\n"
)


def write(tmp_path, content):
    path = tmp_path / "quarantine.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_comments_blank_lines_and_line_ends_of_any_system_are_passed_over(tmp_path):
    found = read_quarantine(write(tmp_path, LIST))
    assert found == {"s/s-000000/a", "s/s-000000/deep/er/b", "t/t-000001/a b #1"}
    assert read_quarantine(write(tmp_path, "")) == frozenset()


@pytest.mark.parametrize("line", ["a", "s/s-000000", "s/s-000000/", "/s-000000/a", "s//a", "a b c"])
def test_a_line_that_is_no_key_is_named_by_its_number(line, tmp_path):
    with pytest.raises(ValueError, match=r"quarantine\.txt, line 3: .* is no key; write <source>/<shard stem>/"):
        read_quarantine(write(tmp_path, f"# one\ns/s-000000/a\n{line}\n"))


def test_a_list_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.txt cannot be read"):
        read_quarantine(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"quarantine\.txt cannot be read"):
        read_quarantine(write(tmp_path, b"\xff\xfe\x00"))


def test_rows_of_a_shard_are_found_by_whole_keys_alone():
    keys = frozenset({"s/s-000000/b", "s/s-000000/d/e", "s/s-000001/a", "t/s-000000/a", "s/s-000000/*", "s/s-000000/z"})
    rows = quarantined_rows(keys, "s", "s-000000", ["a", "b", "c", "d/e", "b"])
    assert rows.dtype == np.int64 and rows.tolist() == [1, 3, 4]
    assert quarantined_rows(keys, "s", "s-00000", ["a", "b"]).tolist() == []
    assert quarantined_rows(frozenset(), "s", "s-000000", ["a"]).dtype == np.int64


def test_keys_that_name_nothing_are_warned_about(tmp_path, caplog):
    keys = frozenset({"s/x/a", "s/x/b", *(f"s/y/{i:03d}" for i in range(30))})
    unmatched = report_unmatched(tmp_path / "list.txt", keys, {"s/x/a", "s/x/other"})
    assert unmatched == sorted(keys - {"s/x/a"}) and len(unmatched) == 31
    assert "31 of 32 keys" in caplog.text and "s/x/b" in caplog.text and "and 11 more" in caplog.text
    caplog.clear()
    assert report_unmatched(tmp_path / "list.txt", keys, set(keys)) == [] and not caplog.text
