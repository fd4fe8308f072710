"""The books of a run: they balance after whatever stopped it, and never hide why it stopped."""

import errno

import pytest

from eagle_train.__main__ import main
from eagle_train.data.ledger import Ledger
from eagle_train.data.ledger_read import read_ledger
from tests.runs import accounts, losses, overrides


@pytest.mark.slow
def test_a_full_disk_ends_the_command_with_the_reason_and_the_next_start_goes_on(data, tmp_path, capsys, monkeypatch):
    write, calls = Ledger._write, []

    def fail(self, path, rows):
        calls.append(path)
        if len(calls) == 7:  # the header and the steps of two stages: step 1 of the second
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_write", fail)
        assert main(overrides(data, tmp_path)) == 1
    said = capsys.readouterr().err
    assert "error: the ledger cannot be written" in said and "No space left on device" in said
    assert "Traceback" not in said and len(losses(tmp_path)) == 4, "the step that is not on record is not trained on"
    assert main(overrides(data, tmp_path)) == 0
    assert len(losses(tmp_path)) == 9
    for stage, entries in accounts(tmp_path).items():
        assert sum(entry["used"] for entry in entries.values()) == len(read_ledger(tmp_path / "ledger", stage)) > 0
        assert all(entry["read"] == entry["used"] + sum(entry["dropped"].values()) for entry in entries.values())
        assert sum(entry["frames"] for entry in entries.values()) > 0 or stage == "pretrain"
        for entry in entries.values():
            assert (entry["tokens"] > entry["targets"] > 0) == (entry["used"] > 0)


@pytest.mark.slow
def test_accounts_that_cannot_be_written_do_not_hide_why_a_run_stops(data, tmp_path, caplog, monkeypatch):
    (tmp_path / "accounting.json.partial").mkdir()

    def fail(self, step, batch):
        raise ValueError("the reason")

    monkeypatch.setattr(Ledger, "record", fail)
    with pytest.raises(ValueError, match="the reason"):
        main(overrides(data, tmp_path))
    assert "accounting.json" in caplog.text and "cannot write" in caplog.text
