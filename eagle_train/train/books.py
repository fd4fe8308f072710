"""The books of a stage: what was read, used and dropped by source, and the budget of bad samples."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from eagle_train import dist
from eagle_train.data.budget import BadSampleBudget
from eagle_train.data.catalog import Catalog
from eagle_train.data.ledger import LedgerShard
from eagle_train.data.ledger_read import account, read_bad
from eagle_train.train.checkpoint import TrainState
from eagle_train.train.run_folder import replace_text
from eagle_train.train.stage_data import StageData
from eagle_train.types import SampleError

log = logging.getLogger(__name__)

MEASURES = {"samples": "used", "tokens": "tokens", "supervised_tokens": "targets"}
"""What shares may be of, and the entry of an account that holds it."""


def write_accounts(folder: Path, state: TrainState, data: StageData) -> None:
    """Writes `accounting.json` and `mixture.json` of a run, with this stage's part made anew.

    What was read is counted from the plan, what became of it from the ledger: where they disagree, a warning
    says so. `shortened` is what the plan cuts off too long samples: each counts once, whatever the number of epochs.
    """
    accounts = account(folder / "ledger", state.stage, state.step, state.read, data.catalog.dropped())
    for source, shortened in data.catalog.shortened().items():
        accounts[source]["shortened"] = asdict(shortened)
    for source, entry in accounts.items():
        if entry["read"] != entry["used"] + sum(entry["dropped"].values()):
            log.warning("the books of %s in stage %s do not balance: %s", source, state.stage, entry)
    mixture = {
        name: {"asked": data.asked[name], "of": data.measure} | shares(accounts, name, data.measure)
        for name in accounts
    }
    for name, part in (("accounting.json", accounts), ("mixture.json", mixture)):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        try:
            replace_text(path, json.dumps(content | {state.stage: part}, indent=1))
        except OSError as error:  # they are made again from the ledger, and must not hide why a run stops
            log.warning("cannot write %s: %s", path, error)


def shares(accounts: dict[str, dict], name: str, measure: str) -> dict[str, float]:
    """Returns a source's share of what was used: `realized` in the measure that was asked for, and in every one."""
    found = {}
    for known, entry in MEASURES.items():
        total = sum(account[entry] for account in accounts.values())
        found[known] = accounts[name][entry] / max(total, 1)
    return {"realized": found[measure], **found}


def make_budget(folder: Path, state: TrainState, data: StageData, max_bad_share: float) -> BadSampleBudget:
    """Returns the budget of bad samples, with those that the index and the ledger know already.

    Args:
        max_bad_share: largest share that may be bad of a source without one of its own.
    """
    sources = data.catalog.sources
    sizes = {source.name: size for source, size in zip(sources, data.catalog.source_sizes(), strict=True)}
    known = [(data.catalog.source_of_sample(number).name, error) for number, error in data.catalog.errors()]
    seen = dist.broadcast_object(dropped_before(folder, state) if dist.rank() == 0 else None)
    shares = {source.name: source.bad_share(max_bad_share) for source in sources}
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
    return [
        LedgerShard(
            source=catalog.sources[shard.source].name,
            location=str(shard.location.absolute() if isinstance(shard.location, Path) else shard.location),
            num_samples=shard.summary.num_samples,
            index_dir=None if shard.index_dir is None else str(shard.index_dir.absolute()),
        )
        for shard in catalog.shards
    ]
