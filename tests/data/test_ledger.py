"""The ledger: what is written is read, later attempts supersede, and shards stay the same shards."""

import random
from dataclasses import replace

import pytest

from eagle_train.data.ledger import HEADER, RECORD, Ledger, LedgerShard, records_path
from eagle_train.data.ledger_read import read_bad, read_ledger
from eagle_train.types import REASONS
from tests.data.ledgers import SHARDS, cut, random_use, row, use, write


def facts(table):
    names = ("attempt", "rank", "step", "row", "status", "shard", "index", "num_tokens", "num_targets", "num_tiles")
    return list(zip(*(table.records[name].tolist() for name in names), strict=True))


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


def test_keys_of_shards_behind_urls_begin_as_they_are_printed():
    url = "http://host/x/train-0000.tar?token=abc/1.2"
    assert LedgerShard(source="s", location=url, num_samples=1).prefix == "s/train-0000/"


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


def test_a_synced_ledger_holds_what_was_recorded_while_it_is_open(tmp_path):
    ledger = Ledger(tmp_path, "x", 0, 0, SHARDS)
    ledger.record(0, row(0, use(index=1), use(index=2)))
    ledger.sync()
    assert read_ledger(tmp_path, "x").records["index"].tolist() == [1, 2]
    ledger.record(1, row(1, use(index=3)))
    ledger.flush()
    assert read_ledger(tmp_path, "x").records["index"].tolist() == [1, 2, 3]
    ledger.close()


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
