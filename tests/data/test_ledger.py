"""The ledger: nothing is lost but what a kill tore, later attempts supersede, and the books balance."""

import errno
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eagle_train.data.collate import pack
from eagle_train.data.ledger import HEADER, MAGIC, RECORD, USED, VERSION, Ledger, LedgerError, LedgerShard, records_path
from eagle_train.data.ledger_read import account, open_files, read_bad, read_ledger
from eagle_train.types import REASONS, SampleError, SampleUse

SHARDS = [
    LedgerShard(source="a", location="/data/a/a-000000.tar", num_samples=50),
    LedgerShard(source="b", location="s3://bucket/b/b-000000.tar", num_samples=50, index_dir="/index"),
]


def use(shard=0, index=0, tokens=10, reason=None):
    if reason is not None:
        error = SampleError(f"{SHARDS[shard].prefix}{index}", reason, f"detail of {index}")
        return SampleUse(shard=shard, index=index, num_tokens=0, num_targets=0, num_tiles=0, num_frames=0, error=error)
    return SampleUse(
        shard=shard, index=index, num_tokens=tokens, num_targets=tokens // 2, num_tiles=index % 3, num_frames=index % 2
    )


def row(number, *uses):
    """A row with these uses; what else it holds does not matter here."""
    keys = tuple(str(u.index) for u in uses if u.error is None)
    errors = tuple((SHARDS[u.shard].source, u.error) for u in uses if u.error is not None)
    return replace(pack([], [], filler_id=0, tile_size=4), row=number, uses=uses, keys=keys, errors=errors)


def write(folder, rank, attempt, steps, shards=SHARDS):
    """Writes {step: rows} as one rank of one attempt."""
    ledger = Ledger(folder, "x", rank, attempt, shards)
    for step, rows in steps.items():
        for one in rows:
            ledger.record(step, one)
        ledger.flush()
    ledger.close()


def cut(path: Path, num_bytes: int):
    path.write_bytes(path.read_bytes()[: path.stat().st_size - num_bytes])


def facts(table):
    names = ("attempt", "rank", "step", "row", "status", "shard", "index", "num_tokens", "num_targets", "num_tiles")
    return list(zip(*(table.records[name].tolist() for name in names), strict=True))


def random_use(draw):
    reason = draw.choice([None, None, None, "unreadable_image", REASONS[-1]])
    return use(draw.randrange(2), draw.randrange(50), draw.randrange(1, 1 << 20), reason)


@pytest.mark.parametrize("seed", range(25))
def test_any_ranks_and_attempts_merge_as_a_plain_model_says(seed, tmp_path):
    draw = random.Random(seed)
    kept, lost, reached = [], [], 0
    for attempt in range(draw.randrange(1, 5)):
        first, written = draw.randrange(reached + 1), []
        reached = first + draw.randrange(1, 8)
        ranks = draw.randrange(1, 5)
        for rank in range(ranks):
            steps, mine = {}, []
            for step in range(first, reached):
                # Three rows a step, dealt to the ranks; the rank without one has an empty row.
                numbers = [n for n in range(step * 3, step * 3 + 3) if n % ranks == rank]
                rows = [row(n, *(random_use(draw) for _ in range(draw.randrange(1, 4)))) for n in numbers]
                steps[step] = rows or [row(-1)]
                mine += [(step, r.row, one) for r in rows for one in r.uses]
            write(tmp_path, rank, attempt, steps)
            if mine and draw.random() < 0.5:  # killed: a part of the last record is missing
                cut(records_path(tmp_path, "x", rank, attempt), draw.randrange(1, RECORD.itemsize))
                mine.pop()
            written += [
                (
                    attempt,
                    rank,
                    step,
                    number,
                    0 if u.error is None else REASONS.index(u.error.reason) + 1,
                    u.shard,
                    u.index,
                    u.num_tokens,
                    u.num_targets,
                    u.num_tiles,
                )
                for step, number, u in mine
            ]
        begin = min((fact[2] for fact in written), default=10**9)
        lost += [fact for fact in kept if fact[2] >= begin]
        kept = [fact for fact in kept if fact[2] < begin] + written
    assert kept
    table = read_ledger(tmp_path, "x")
    assert facts(table) == sorted(kept, key=lambda fact: (fact[2], fact[3]))  # stable: in a row as planned
    assert not table.superseded.any()
    whole = read_ledger(tmp_path, "x", superseded=True)
    marked = list(zip(facts(whole), whole.superseded.tolist(), strict=True))
    assert sorted(fact for fact, gone in marked if gone) == sorted(lost)
    assert sorted(fact for fact, gone in marked if not gone) == sorted(kept)


def test_a_lost_future_does_not_count_even_before_it_is_reached_again(tmp_path):
    write(tmp_path, 0, 0, {step: [row(step, use(index=step))] for step in range(10)})
    write(tmp_path, 0, 1, {step: [row(step, use(index=step))] for step in (4, 5)})
    assert read_ledger(tmp_path, "x").records["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert read_ledger(tmp_path, "x").records["attempt"].tolist() == [0, 0, 0, 0, 1, 1]


def test_ranks_with_nothing_but_empty_rows_do_not_bring_old_records_back(tmp_path):
    write(tmp_path, 0, 0, {0: [row(0, use(index=1))], 1: [row(2, use(index=3))]})
    write(tmp_path, 1, 0, {0: [row(1, use(index=2))], 1: [row(-1)]})
    write(tmp_path, 0, 1, {0: [row(-1)], 1: [row(-1)]})
    write(tmp_path, 1, 1, {0: [row(0, use(index=1)), row(1, use(index=2))], 1: [row(2, use(index=3))]})
    table = read_ledger(tmp_path, "x")
    assert table.records["attempt"].tolist() == [1, 1, 1] and table.records["rank"].tolist() == [1, 1, 1]
    assert table.records["index"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("left", [0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 1, HEADER.size + RECORD.itemsize])
def test_a_file_cut_anywhere_gives_its_whole_records(left, tmp_path):
    write(tmp_path, 0, 0, {0: [row(0, use(), use(index=1))]})
    path = records_path(tmp_path, "x", 0, 0)
    path.write_bytes(path.read_bytes()[:left])
    assert len(read_ledger(tmp_path, "x")) == max(0, left - HEADER.size) // RECORD.itemsize


def test_zeros_that_a_power_cut_left_at_the_end_are_no_records(tmp_path):
    write(tmp_path, 0, 0, {0: [row(0, use())]})
    with records_path(tmp_path, "x", 0, 0).open("ab") as file:
        file.write(bytes(4096))
    write(tmp_path, 1, 0, {0: [row(1, use(index=1))]})
    path = records_path(tmp_path, "x", 1, 0)
    path.write_bytes(bytes(path.stat().st_size))
    assert read_ledger(tmp_path, "x").records["index"].tolist() == [0]


def test_a_record_takes_forty_bytes(tmp_path):
    write(tmp_path, 0, 0, {step: [row(step, *(use(index=i) for i in range(10)))] for step in range(10)})
    assert records_path(tmp_path, "x", 0, 0).stat().st_size == HEADER.size + 100 * 40


def test_bad_samples_keep_key_and_detail_beside_their_record(tmp_path):
    write(tmp_path, 0, 0, {0: [row(0, use(reason="too_long"))], 1: [row(1, use(1, 7, reason="unreadable_video"))]})
    write(tmp_path, 2, 1, {1: [row(1, use(1, 7, reason="missing_media"), use())]})
    found = read_bad(tmp_path, "x")
    assert [(b.step, b.row, b.rank, b.attempt, b.source, b.error.reason, b.superseded) for b in found] == [
        (0, 0, 0, 0, "a", "too_long", False),
        (1, 1, 0, 0, "b", "unreadable_video", True),
        (1, 1, 2, 1, "b", "missing_media", False),
    ]
    assert found[1].error.key == "b/b-000000/7" and found[1].error.detail == "detail of 7"
    (path,) = (tmp_path / "x").glob("rank-00002*.errors.jsonl")
    cut(path, 5)
    assert len(read_bad(tmp_path, "x")) == 2


def test_an_attempt_is_written_once(tmp_path):
    write(tmp_path, 0, 0, {0: [row(0, use())]})
    with pytest.raises(ValueError, match=r"is there already: attempt 0 of this run .*restore attempts\.jsonl"):
        Ledger(tmp_path, "x", 0, 0, SHARDS)
    assert len(read_ledger(tmp_path, "x")) == 1


def test_a_row_with_samples_that_are_not_on_record_is_refused(tmp_path):
    ledger = Ledger(tmp_path, "x", 0, 0, SHARDS)
    with pytest.raises(AssertionError, match="row 3 has 1 samples and 0 uses"):
        ledger.record(0, replace(row(3, use()), uses=()))
    ledger.close()


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


def test_shards_that_moved_or_were_numbered_anew_stay_the_same_shards(tmp_path):
    moved = [replace(shard, location=shard.location.replace("/data", "/new")) for shard in reversed(SHARDS)]
    write(tmp_path, 0, 0, {0: [row(0, use(0, 3), use(1, 4))]})
    write(tmp_path, 0, 1, {1: [row(1, use(1, 5), use(0, 6))]}, moved)
    table = read_ledger(tmp_path, "x")
    assert [table.shards[n].prefix for n in table.records["shard"]] == [
        "a/a-000000/",
        "b/b-000000/",
        "a/a-000000/",
        "b/b-000000/",
    ]
    assert [shard.location for shard in table.shards] == ["/new/a/a-000000.tar", "s3://bucket/b/b-000000.tar"]
    assert len(list((tmp_path / "x").glob("shards-*.json"))) == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"NOLEDGER" + data[8:], "is no ledger of version 1"),
        (lambda data: data[:-36] + b"\xff" + data[-35:], "status 255, known are 0 to"),
        (lambda data: data[:-24] + b"\x09" + data[-23:], "shard 9, its list has 2"),
    ],
)
def test_a_damaged_file_is_named(damage, said, tmp_path):
    write(tmp_path, 0, 0, {0: [row(0, use())]})
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


def test_a_stage_without_a_ledger_is_empty(tmp_path):
    assert len(read_ledger(tmp_path, "x")) == 0 and read_bad(tmp_path, "x") == []
    entry = account(tmp_path, "x", 5, {"a": 0}, {"a": {}})["a"]
    assert entry["used"] == entry["tokens"] == 0


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
