"""Small ledgers for tests."""

from dataclasses import replace
from pathlib import Path

from eagle_train.data.collate import pack
from eagle_train.data.ledger import Ledger, LedgerShard
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


def random_use(draw):
    reason = draw.choice([None, None, None, "unreadable_image", REASONS[-1]])
    return use(draw.randrange(2), draw.randrange(50), draw.randrange(1, 1 << 20), reason)
