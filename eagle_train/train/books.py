"""The books of a stage: what was read, used and dropped by source, and the budget of bad samples."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np

from eagle_train import dist
from eagle_train.data.budget import BadSampleBudget
from eagle_train.data.catalog import Catalog
from eagle_train.data.ledger import LedgerShard
from eagle_train.data.ledger_read import account, read_bad
from eagle_train.train.assemble import StageData
from eagle_train.train.checkpoint import TrainState
from eagle_train.train.schedule import Stage
from eagle_train.types import SampleError

log = logging.getLogger(__name__)


def write_accounts(folder: Path, state: TrainState, stage: Stage, data: StageData) -> None:
    """Writes `accounting.json` and `mixture.json` of a run, with this stage's part made anew.

    What was read is counted from the plan, what became of it from the ledger: where they disagree, a warning
    says so. `shortened` is what the plan cuts off too long samples: each counts once, whatever the number of epochs.
    """
    read = samples_in_rows(data, state.step * stage.rows_per_step)
    total = samples_in_rows(data, len(data.rows))
    accounts = account(folder / "ledger", state.stage, state.step, read, total, data.catalog.dropped())
    for source, shortened in data.catalog.shortened().items():
        accounts[source]["shortened"] = asdict(shortened)
    for source, entry in accounts.items():
        if entry["read"] != entry["used"] + sum(entry["dropped"].values()):
            log.warning("the books of %s in stage %s do not balance: %s", source, state.stage, entry)
    used = sum(entry["used"] for entry in accounts.values())
    asked = data.asked_shares()
    mixture = {
        name: {"asked": asked[name], "realized": entry["used"] / max(used, 1)} for name, entry in accounts.items()
    }
    for name, part in (("accounting.json", accounts), ("mixture.json", mixture)):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        aside = path.with_name(f"{name}.partial")
        try:
            aside.write_text(json.dumps(content | {state.stage: part}, indent=1))
            aside.replace(path)
        except OSError as error:  # they are made again from the ledger, and must not hide why a run stops
            log.warning("cannot write %s: %s", path, error)


def samples_in_rows(data: StageData, num_rows: int) -> dict[str, int]:
    """Returns the number of samples in the first `num_rows` rows of a stage's plan, by source."""
    samples = data.rows.samples[: data.rows.offsets[min(num_rows, len(data.rows))]]
    counts = np.bincount(data.catalog.source_ids[samples], minlength=len(data.catalog.sources))
    return {source.name: int(count) for source, count in zip(data.catalog.sources, counts, strict=True)}


def make_budget(folder: Path, state: TrainState, data: StageData, max_bad_share: float) -> BadSampleBudget:
    """Returns the budget of bad samples, with those that the index and the ledger know already.

    Args:
        max_bad_share: largest share that may be bad of a source without one of its own.
    """
    names = [source.name for source in data.catalog.sources]
    sizes = dict(zip(names, data.catalog.source_sizes(), strict=True))
    known = [(names[data.catalog.source_ids[number]], error) for number, error in data.catalog.errors.items()]
    seen = dist.broadcast_object(dropped_before(folder, state) if dist.rank() == 0 else None)
    shares = {source.name: source.bad_share(max_bad_share) for source in data.catalog.sources}
    return BadSampleBudget(sizes, shares, [*known, *seen])


def dropped_before(folder: Path, state: TrainState) -> list[tuple[str, SampleError]]:
    """Returns (source, error) of the samples that this stage dropped before the present step."""
    return [
        (bad.source, bad.error)
        for bad in read_bad(folder / "ledger", state.stage)
        if bad.step < state.step and not bad.superseded
    ]


def ledger_shards(catalog: Catalog) -> list[LedgerShard]:
    """Returns the shards of a catalog as the ledger keeps them: where they are, so that keys can be found later."""
    counts = np.bincount(catalog.shard_ids, minlength=len(catalog.shards)).tolist()
    places = [(source, shard) for source in catalog.sources for shard in source.shards]
    return [
        LedgerShard(
            source=source.name,
            location=str(shard.absolute()),
            num_samples=count,
            index_dir=None if source.index_dir is None else str(source.index_dir.absolute()),
        )
        for (source, shard), count in zip(places, counts, strict=True)
    ]
