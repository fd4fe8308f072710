"""`python -m eagle_train replay STEP RUN [--checkpoint FOLDER] [--rank-rows] [--json]`: a step made again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from eagle_train.data.replay import RebuiltRow, digest, rebuild, recorded_rows
from eagle_train.train.assemble import build_schedule
from eagle_train.train.books import ledger_shards
from eagle_train.train.replay import (
    checkpoints,
    config_of_run,
    find_step,
    given_checkpoint,
    recorded_losses,
    stage_dataset,
    step_losses,
    steps_on_record,
    weights_before,
)

CLOSE = {False: 1e-3, True: 3e-2}
"""Losses that differ by no larger share are taken for the same step on other hardware or ranks; True: under bf16."""
DESCRIPTION = """Makes a step of a run again: finds its samples in the ledger, reads, decodes and packs them, prints
each row with its keys, tokens, tiles, weight and SHA-256, and says what is not as it was recorded.

With the weights before the step - a checkpoint of exactly the step before, or for step 1 those the run began with -
its loss is computed too and compared with the one in metrics.jsonl (if it was logged by itself, as log_every=1 does).
On one rank of the plain engine and the same machine both are equal to the bit. The exit code is 1 if something differs.
"""


def main(argv: list[str]) -> int:
    """Prints a step made again; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train replay",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", type=int, help="global step as in metrics.jsonl: from 1, through all stages")
    parser.add_argument("run", type=Path, help="run folder, for example runs/toy")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="default: the fitting one in RUN/checkpoints")
    parser.add_argument("--rank-rows", action="store_true", help="rank by rank, each in the order it ran its rows")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    found = replay(options.run, options.step, options.checkpoint)
    if not options.rank_rows:
        found["rows"].sort(key=lambda row: row["row"])
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0 if found["equal"] else 1


def replay(run: Path, step: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """Returns what a step was made of and what differs from the records, as plain JSON values.

    Args:
        step: global, from 1.
        checkpoint: with the weights before it; None: looked for.

    Raises:
        ValueError: if there is no such step on record, its data is gone, or the checkpoint is of another step.
    """
    config = config_of_run(run)
    place = find_step(run, config, step)
    there = checkpoints(run)
    checkpoint = given_checkpoint(checkpoint, step) if checkpoint else there.get(step - 1)
    if checkpoint is not None:
        config = yaml.safe_load((checkpoint / "config.yaml").read_text())  # that of then
    dataset = stage_dataset(config, build_schedule(config)[place.stage])
    recorded = recorded_rows(place.files, place.step)
    rows = list(rebuild(recorded, dataset, ledger_shards(dataset.catalog)))
    dataset.close()
    differences = [text for row in rows for text in row.differences]
    found = {
        "stage": place.stage,
        "stage_step": place.step,
        "global_step": step,
        "rows": [facts(row) for row in rows],
        "differences": differences,
    }
    if checkpoint is not None or step == 1:
        engine = weights_before(config, place, checkpoint)
        made = step_losses(engine, rows, [source.name for source in dataset.catalog.sources])
        weights = str(checkpoint) if checkpoint else "those the run began with"
        loss = compare(made, recorded_losses(run, config, place), engine.bf16) | {"weights": weights}
    else:
        loss = {"verdict": not_checked(step, there, config, steps_on_record(run, config))}
    return found | {"loss": loss, "equal": not differences and loss.get("equal", True)}


def facts(row: RebuiltRow) -> dict[str, Any]:
    """Returns what is told of a row."""
    batch = row.batch
    return {
        "row": row.recorded.row,
        "rank": row.recorded.rank,
        "attempt": row.recorded.attempt,
        "keys": list(batch.keys),
        "num_tokens": batch.num_tokens,
        "num_tiles": batch.num_images,
        "weight": float(batch.loss_weights.double().sum()),
        "sha256": digest(batch),
        "dropped": [{"key": error.key, "reason": error.reason, "detail": error.detail} for _, error in batch.errors],
    }


def compare(made: Mapping[str, float], recorded: Mapping[str, float], bf16: bool) -> dict[str, Any]:
    """Returns both losses and what is to be said about them."""
    if not made:
        return {"verdict": "no token of the step has a weight: it was passed over", "equal": not recorded}
    found = {"rebuilt": dict(made), "recorded": dict(recorded)}
    if not recorded:
        return found | {"verdict": "metrics.jsonl has no loss of this step alone; log_every=1 keeps every one"}
    if made == recorded:
        return found | {"verdict": "equal to the bit, of all and by source", "equal": True}
    apart = {name for name in made.keys() | recorded.keys() if made.get(name) != recorded.get(name)}
    shares = [abs(made[name] / recorded[name] - 1) if {name} <= made.keys() & recorded.keys() else 1 for name in apart]
    worst = max(shares)
    if worst <= CLOSE[bf16]:
        verdict = f"close: they differ by at most {worst:.1e} of the recorded, as other hardware or ranks do"
        return found | {"verdict": verdict, "equal": True}
    verdict = f"different, by up to {worst:.1e} of the recorded ({', '.join(sorted(apart))})"
    return found | {"verdict": verdict, "equal": False}


def not_checked(step: int, there: Mapping[int, Path], config: Mapping[str, Any], last: int) -> str:
    """Returns why the loss is not computed, and what would help.

    Args:
        there: checkpoints by the step after which they were written.
        last: global step on record.
    """
    steps = ", ".join(str(after + 1) for after in sorted({0, *there}) if after < last)
    return (
        f"not computed: no checkpoint holds the weights before step {step}. Steps whose loss can be checked: {steps}; "
        f"this run saves every {config['save_every']} steps and keeps {config['keep_last']}: a smaller save_every and "
        "a larger keep_last keep more"
    )


def show(found: Mapping[str, Any]) -> None:
    """Prints a step for reading."""
    print(f"step {found['global_step']}: step {found['stage_step']} of stage {found['stage']}, counted from 0")
    for row in found["rows"]:
        print(
            f"  row {row['row']} (rank {row['rank']}, attempt {row['attempt']}): {row['num_tokens']} tokens, "
            f"{row['num_tiles']} tiles, weight {row['weight']:.6g}, sha256 {row['sha256']}"
        )
        print("\n".join(f"    {key}" for key in row["keys"]))
        for bad in row["dropped"]:
            print(f"    {bad['key']}: dropped as {bad['reason']}: {bad['detail']}")
    differences: Sequence[str] = found["differences"]
    print("every sample is as it was recorded" if not differences else f"{len(differences)} samples differ:")
    print("".join(f"  {text}\n" for text in differences), end="")
    loss = found["loss"]
    if "rebuilt" in loss:
        recorded = loss["recorded"].get("train/loss")
        print(f"loss {loss['rebuilt']['train/loss']!r}, recorded {recorded!r} (weights: {loss['weights']})")
    print(f"loss: {loss['verdict']}")
