"""What breaks under a run: it goes on or stops with the right words, and its books balance, over the resume too."""

import errno
import multiprocessing
import os
import signal

import pytest

from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.ledger import Ledger, LedgerError
from eagle_train.data.shards import write_shards
from eagle_train.track.jsonl import JsonlTracker
from eagle_train.train.app import train
from eagle_train.train.config import ConfigError
from tests.data.loads import jpeg
from tests.data.test_bad_samples import GOOD, add_source, corrupt, png, record
from tests.runs import accounts, config, losses, overrides, rows, start
from tests.test_resume import run_until

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
NUM_STEPS = 9  # 1 of pretrain, 8 of sft


@pytest.fixture
def mine(data, tmp_path):
    """Returns what makes the config of a run on 20 samples, and more, in shards of 5."""

    def make(*more, extra=()):
        settings = add_source(data, tmp_path, GOOD)
        write_shards([*GOOD, *extra], tmp_path / "mine", samples_per_shard=5)
        settings += ["schedule.sft.num_epochs=null", "schedule.sft.num_steps=8", "schedule.sft.max_length=128"]
        return config(data, tmp_path / "run", *settings, "schedule.sft.rows_per_step=1", *more)

    return make


def at_step(monkeypatch, step, action):
    """Does something once when global step `step` is logged."""
    log, todo = JsonlTracker.log, [action]

    def acting(self, metrics, at):
        log(self, metrics, at)
        if at == step and todo:
            todo.pop()()

    monkeypatch.setattr(JsonlTracker, "log", acting)


def balance(run, caplog):
    """Returns the account of the source `mine`, having checked that every account balances."""
    for entries in accounts(run).values():
        for source, entry in entries.items():
            assert entry["read"] == entry["used"] + sum(entry["dropped"].values()), source
    assert "do not balance" not in caplog.text
    return accounts(run)["sft"]["mine"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["vanished", "cut"])
def test_a_shard_lost_while_training_is_counted_and_restored_it_comes_back(mine, tmp_path, monkeypatch, caplog, fault):
    chosen = mine("data.max_bad_share=0.5", "save_every=3")
    shard, run = tmp_path / "mine" / "mine-000001.tar", tmp_path / "run"
    whole = shard.read_bytes()

    def lose():
        if fault == "cut":  # under the open file
            os.truncate(shard, 0)
        else:
            shard.rename(shard.with_suffix(".away"))

    with monkeypatch.context() as patch:
        at_step(patch, 2, lose)
        run_until(chosen, 6, patch)
    lost = balance(run, caplog)
    if fault == "cut":
        assert 0 < lost["dropped"]["missing_shard"] < lost["read"]
    shard.write_bytes(whole)
    assert train(chosen)
    entry = balance(run, caplog)
    assert len(losses(run)) == NUM_STEPS and entry["used"] > lost["used"]
    assert entry["dropped"].get("missing_shard", 0) <= lost["dropped"].get("missing_shard", 0)


@pytest.mark.slow
def test_a_shard_that_is_gone_or_cut_at_the_next_start_is_named(mine, tmp_path, monkeypatch, caplog):
    chosen = mine("data.max_bad_share=0.5")
    shard = tmp_path / "mine" / "mine-000001.tar"
    run_until(chosen, 5, monkeypatch)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"mine-000001\.tar: 5 samples, .* -> 5 samples, 1 usable, .* Restore"):
        train(chosen)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"with another plan: data\.mine\.mine-000001\.tar: 5 samples, .* Restore"):
        train(chosen)
    usual = chosen | {"data": chosen["data"] | {"max_bad_share": 0.01}}
    with pytest.raises(TooManyBadSamples, match=r"5 of 20 samples are bad \(5 missing_shard.*\n.*mine-000001"):
        train(usual)
    shard.write_bytes(whole)
    assert train(chosen)
    assert balance(tmp_path / "run", caplog)["dropped"] == {}


@pytest.mark.slow
def test_over_the_budget_the_run_stops_with_the_list_and_goes_on_when_repaired(mine, tmp_path, caplog):
    chosen = mine(extra=[("torn", record(), {"0.png": jpeg()[:2000]})])
    run = tmp_path / "run"
    with pytest.raises(TooManyBadSamples, match=r"1 of 21 samples are bad .*\n  mine/mine-000004/torn: unreadable"):
        train(chosen)
    stopped = balance(run, caplog)
    assert stopped["dropped"] == {} or stopped["dropped"] == {"unreadable_image": 1}
    done = len(losses(run))
    assert done < NUM_STEPS
    (tmp_path / "list.txt").write_text("mine/mine-000004/torn\n")
    quarantined = chosen | {"data": chosen["data"] | {"quarantine": str(tmp_path / "list.txt")}}
    with pytest.raises(ConfigError, match=r"another plan.*1 quarantined"):
        train(quarantined)
    assert train(quarantined | {"accept_changed_plan": True})
    entry = balance(run, caplog)
    assert len(losses(run)) == NUM_STEPS and entry["dropped"]["quarantined"] == 1


@pytest.mark.slow
def test_a_sample_repaired_in_place_is_used_when_its_step_is_run_again(mine, tmp_path, caplog):
    broken, good = corrupt(seed=7), png(7, (200, 200))
    assert len(broken) == len(good)
    chosen = mine(extra=[("torn", record(), {"0.png": broken})])
    with pytest.raises(TooManyBadSamples, match="mine/mine-000004/torn: unreadable_image"):
        train(chosen)
    shard = tmp_path / "mine" / "mine-000004.tar"
    shard.write_bytes(shard.read_bytes().replace(broken, good))
    assert train(chosen)
    entry = balance(tmp_path / "run", caplog)
    assert entry["dropped"] == {} and entry["used"] == entry["read"] > 21


@pytest.mark.slow
def test_a_full_disk_under_the_ledger_stops_before_the_step_and_room_lets_it_go_on(mine, tmp_path, monkeypatch, caplog):
    chosen, run = mine("save_every=2"), tmp_path / "run"
    write, full = Ledger._write, []

    def write_a_part(self, path, data):
        if full:
            write(self, path, data[:50])  # a record and a quarter
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, path, data)

    with monkeypatch.context() as patch, pytest.raises(LedgerError, match=r"sft/rank-00000.*No space left.*Make room"):
        patch.setattr(Ledger, "_write", write_a_part)
        at_step(patch, 4, lambda: full.append(True))
        train(chosen)
    assert len(losses(run)) == 4, "the step that cannot be recorded is not trained on"
    assert balance(run, caplog)["used"] > 0
    assert train(chosen)
    assert balance(run, caplog)["dropped"] == {} and len(losses(run)) == NUM_STEPS


@pytest.mark.slow
def test_a_killed_worker_does_not_change_the_run(mine, tmp_path, monkeypatch, caplog):
    chosen = mine("data.num_workers=2", "data.prefetch=1")  # so that rows are left to make at the kill
    assert train(mine() | {"run_dir": str(tmp_path / "whole")})
    others = set(multiprocessing.active_children())

    def kill():
        worker = (set(multiprocessing.active_children()) - others).pop()
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()

    at_step(monkeypatch, 3, kill)
    assert train(chosen)
    assert "starting the workers again (1 of 3)" in caplog.text
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and rows(tmp_path / "run") == rows(tmp_path / "whole")
    balance(tmp_path / "run", caplog)


@pytest.mark.slow
def test_an_error_in_a_run_with_workers_ends_the_process(data, tmp_path):
    (tmp_path / "failing.py").write_text(
        "import sys\n"
        "from eagle_train.__main__ import main\n"
        "from eagle_train.train.trainer import Trainer\n"
        "def update(self, rows, weight):\n"
        "    raise RuntimeError('out of memory')\n"
        "Trainer.update = update\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = overrides(data, tmp_path / "run", "data.num_workers=2")
    paths = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = start(arguments, "failing", PYTHONPATH=paths)
    _, said = process.communicate(timeout=60)  # workers that nobody ends would keep it for ever
    assert process.returncode == 1 and "RuntimeError: out of memory" in said
