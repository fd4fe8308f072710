"""The books of a run balance at any step, and are those of a plain count."""

import random

import numpy as np

from eagle_train.data.ledger import HEADER, MAGIC, RECORD, USED, VERSION, records_path
from eagle_train.data.ledger_read import account, open_files, read_bad, read_ledger
from eagle_train.types import REASONS
from tests.data.ledgers import SHARDS, random_use, row, use, write


def test_a_stage_without_a_ledger_is_empty(tmp_path):
    assert len(read_ledger(tmp_path, "x")) == 0 and read_bad(tmp_path, "x") == []
    entry = account(tmp_path, "x", 5, {}, {"a": {}})["a"]
    assert entry["read"] == entry["used"] == entry["tokens"] == 0


def test_books_balance_in_the_middle_of_a_stage(tmp_path):
    write(tmp_path, 0, 0, {0: [row(0, use(), use(index=1))], 1: [row(1, use(index=2))]})
    bad = use(index=4, reason="unreadable_image")
    write(tmp_path, 0, 1, {1: [row(1, use(index=3), bad)], 2: [row(2, use(index=5, tokens=99))]})
    entry = account(tmp_path, "x", 2, {"a": 4}, {"a": {"too_long": 2}})["a"]
    assert entry == {
        "read": 6,
        "used": 3,
        "dropped": {"too_long": 2, "unreadable_image": 1},
        "tokens": 30,
        "targets": 15,
        "tiles": 0 + 1 + 0,
        "frames": 0 + 1 + 1,
    }
    assert account(tmp_path, "x", 2, {"a": 5}, {"a": {}})["a"]["read"] == 5, "the sides are counted apart"


def test_the_accounts_are_those_of_a_plain_count(tmp_path):
    draw = random.Random(0)
    everything = []
    for rank in range(3):
        rows = {step: [row(step * 3 + rank, *(random_use(draw) for _ in range(5)))] for step in range(20)}
        write(tmp_path, rank, 0, rows)
        everything += [u for step in range(15) for one in rows[step] for u in one.uses]
    total = {"a": 1000, "b": 1000}
    read = {name: sum(SHARDS[u.shard].source == name for u in everything) for name in total}
    for name, entry in account(tmp_path, "x", 15, read, {"a": {}, "b": {}}).items():
        mine = [u for u in everything if SHARDS[u.shard].source == name]
        assert entry["used"] == sum(u.error is None for u in mine) > 0
        assert entry["tokens"] == sum(u.num_tokens for u in mine) > 0
        assert entry["frames"] == sum(u.num_frames for u in mine) > 0
        assert entry["read"] == entry["used"] + sum(entry["dropped"].values())
        assert set(entry["dropped"]) == {"unreadable_image", REASONS[-1]}


def test_a_million_records_of_many_ranks_merge_in_order(tmp_path):
    ranks, per_rank = 8, 125_000
    write(tmp_path, 0, 0, {})
    name = open_files(tmp_path, "x")[0].path
    header = HEADER.unpack(name.read_bytes())
    for rank in range(ranks):
        records = np.zeros(per_rank, RECORD)
        records["step"] = np.arange(per_rank) // 50
        records["row"] = records["step"].astype(np.int64) * ranks + rank
        records["index"] = np.arange(per_rank) % 50
        records["num_tokens"] = 7
        head = HEADER.pack(MAGIC, VERSION, RECORD.itemsize, rank, 0, header[-1])
        records_path(tmp_path, "x", rank, 0).write_bytes(head + records.tobytes())
    records = read_ledger(tmp_path, "x").records
    assert len(records) == ranks * per_rank
    assert (np.diff(records["row"]) >= 0).all() and (records["row"] // ranks == records["step"]).all()
    assert (records["index"].reshape(-1, 50) == np.arange(50)).all()
    entry = account(tmp_path, "x", 2500, {"a": 1_000_000, "b": 0}, {"a": {}, "b": {}})["a"]
    assert entry["used"] == 1_000_000 and entry["tokens"] == 7_000_000 and USED == 0
