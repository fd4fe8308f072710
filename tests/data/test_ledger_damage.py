"""Ledgers that a kill tore, a disk had no room for or that were damaged: nothing else is lost, and it is named."""

import errno
import json
from pathlib import Path

import pytest

from eagle_train.data.ledger import HEADER, RECORD, Ledger, LedgerError, records_path
from eagle_train.data.ledger_read import read_ledger
from tests.data.ledgers import SHARDS, row, use, write


@pytest.mark.parametrize("left", [0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 1, HEADER.size + RECORD.itemsize])
def test_a_file_cut_anywhere_gives_its_whole_records(left, tmp_path):
    write(tmp_path, 0, 0, {0: [row(0, use(), use(index=1))]})
    path = records_path(tmp_path, "x", 0, 0)
    path.write_bytes(path.read_bytes()[:left])
    assert len(read_ledger(tmp_path, "x")) == max(0, left - HEADER.size) // RECORD.itemsize


def test_zeros_that_a_power_cut_left_at_the_end_are_no_records(tmp_path):
    write(tmp_path, 0, 0, {step: [row(2 * step, use(index=step))] for step in range(3)})
    with records_path(tmp_path, "x", 0, 0).open("ab") as file:
        file.write(bytes(4096))
    write(tmp_path, 1, 0, {0: [row(1, use(index=1))]})
    path = records_path(tmp_path, "x", 1, 0)
    path.write_bytes(bytes(path.stat().st_size))
    assert read_ledger(tmp_path, "x").records["index"].tolist() == [0, 1, 2]


def test_a_full_disk_stops_with_the_reason_and_later_closes_in_peace(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, "x", 0, 0, SHARDS)
    ledger.record(0, row(0, use()))
    ledger.flush()
    ledger.record(1, row(1, use(index=1), use(index=2)))
    (file,) = ledger._files.values()

    class Full:
        """Takes fifty bytes, then nothing, as a disk does."""

        left = 50

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.left = file.write(data[: self.left]), 0
            return taken

        def close(self):
            file.close()

    ledger._files = dict.fromkeys(ledger._files, Full())
    with pytest.raises(LedgerError, match=r"cannot be written at .*No space left on device.*Make room"):
        ledger.flush()
    ledger.close()
    assert read_ledger(tmp_path, "x").records["index"].tolist() == [0, 1]
    write(tmp_path, 0, 1, {1: [row(1, use(index=1), use(index=2))]})
    assert read_ledger(tmp_path, "x").records["index"].tolist() == [0, 1, 2]


def test_a_real_full_device_is_an_error_not_a_loss(tmp_path):
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("needs /dev/full")
    ledger = Ledger(tmp_path, "x", 0, 0, SHARDS)
    (path,) = ledger._files
    ledger._files.pop(path).close()
    ledger._files[path] = full.open("wb", buffering=0)
    ledger.record(0, row(0, use()))
    with pytest.raises(LedgerError, match="No space left on device"):
        ledger.flush()
    ledger.close()


def test_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="the ledger cannot be written"):
        Ledger(tmp_path / "file", "x", 0, 0, SHARDS)


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    ledger = Ledger(tmp_path, "x", 0, 0, SHARDS)
    ledger.record(0, row(0, use(tokens=1 << 32)))
    with pytest.raises(OverflowError):
        ledger.flush()
    ledger.close()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"NOLEDGER" + data[8:], "is no ledger of version 1"),
        (lambda data: data[:-36] + b"\xff" + data[-35:], "status 255, known are 0 to"),
        (lambda data: data[:-24] + b"\x09" + data[-23:], "shard 9, its list has 2"),
    ],
)
def test_a_damaged_file_is_named(damage, said, tmp_path):
    write(tmp_path, 0, 0, {0: [row(0, use(), use(index=1), use(index=2))]})
    path = records_path(tmp_path, "x", 0, 0)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} .*{said}"):
        read_ledger(tmp_path, "x")


def test_a_lost_list_of_shards_is_named(tmp_path):
    write(tmp_path, 0, 0, {0: [row(0, use())]})
    (path,) = (tmp_path / "x").glob("shards-*.json")
    assert json.loads(path.read_text())[1]["index_dir"] == "/index"
    path.unlink()
    with pytest.raises(ValueError, match=path.name):
        read_ledger(tmp_path, "x")
