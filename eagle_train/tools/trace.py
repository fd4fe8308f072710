"""`python -m eagle_train trace KEY RUN`: when a run saw a sample, what a step held, which samples were bad."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np

from eagle_train.data.ledger import USED
from eagle_train.data.ledger_keys import KeyBook
from eagle_train.data.ledger_read import BadUse, LedgerTable, read_bad, read_ledger
from eagle_train.track.run_folder import read_run
from eagle_train.types import REASONS

SHOWN = 50
"""Keys listed where several match."""
DESCRIPTION = """Reads a run's ledger.

  trace KEY RUN            when a sample was seen: stage, step, row, rank, attempt, and what became of it
  trace --step N RUN       every sample of a step; N as in errors and the ledger, from 0 in its stage
  trace --global-step N RUN   the same; N as in metrics.jsonl, from 1 through all stages
  trace --bad RUN          every sample that turned out bad, once: a line for people, then its key. That is a
                           quarantine list as it stands: trace --bad RUN > quarantine.txt

KEY is <source>/<shard stem>/<tar key>, as in errors. A tar key alone, the end of a key after a slash, or a
pattern with * ? [...] lists what matches. Samples that the plan left out (see accounting.json) are in no step.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One sample in one row, as it is told."""

    stage: str
    step: int
    """From 0 in its stage."""
    global_step: int | None
    """As in metrics.jsonl, from 1; None where no step of the stage was logged."""
    row: int
    rank: int
    attempt: int
    superseded: bool
    """Whether a later attempt ran this step again, so that it left no trace in the weights."""
    key: str
    outcome: str
    """`used`, or the reason why it was not."""
    detail: str
    num_tokens: int
    num_targets: int
    num_tiles: int
    num_frames: int

    def words(self) -> str:
        """Returns what became of the sample."""
        if self.outcome != "used":
            return f"dropped, {self.outcome}: {self.detail}"
        parts = [f"{counted(self.num_tokens, 'token')}, {self.num_targets} of them with loss"]
        parts += [counted(self.num_tiles, "tile")] if self.num_tiles else []
        parts += [counted(self.num_frames, "frame")] if self.num_frames else []
        return f"used, {', '.join(parts)}"

    def when(self) -> str:
        """Returns the step in words."""
        return f"step {self.step}" + ("" if self.global_step is None else f" (global step {self.global_step})")

    def where(self) -> str:
        """Returns row, rank and attempt in words."""
        lost = ", superseded by a later attempt" if self.superseded else ""
        return f"row {self.row}, rank {self.rank}, attempt {self.attempt}{lost}"


@dataclass(frozen=True, kw_only=True)
class StageLedger:
    """The ledger of one stage.

    Args:
        folder: of the run's ledger.
        stage: its name.
        offset: global steps before the stage; None if not known.
    """

    folder: Path
    stage: str
    offset: int | None

    @cached_property
    def table(self) -> LedgerTable:
        """All its records, superseded ones included."""
        return read_ledger(self.folder, self.stage, superseded=True)

    @cached_property
    def book(self) -> KeyBook:
        """The keys of its samples."""
        return KeyBook(self.table.shards)

    @cached_property
    def bad(self) -> list[BadUse]:
        """Its bad samples."""
        return read_bad(self.folder, self.stage)

    @cached_property
    def details(self) -> Mapping[tuple[int, int, int, str], str]:
        """What is wrong with a bad sample, by attempt, step, row and key."""
        return {(bad.attempt, bad.step, bad.row, bad.error.key): bad.error.detail for bad in self.bad}

    def uses(self, chosen: np.ndarray) -> Iterator[Use]:
        """Yields the uses that a mask over the table's records chooses, in the order of step and row."""
        for place in np.flatnonzero(chosen):
            values = dict(zip(self.table.records.dtype.names, self.table.records[place].tolist(), strict=True))
            shard, index, status = (values.pop(name) for name in ("shard", "index", "status"))
            key = self.book.key(shard, index)
            yield Use(
                stage=self.stage,
                global_step=None if self.offset is None else self.offset + values["step"] + 1,
                superseded=bool(self.table.superseded[place]),
                key=key,
                outcome="used" if status == USED else REASONS[status - 1],
                detail=self.details.get((values["attempt"], values["step"], values["row"], key), ""),
                **values,
            )

    def uses_of(self, places: Sequence[tuple[int, int]]) -> list[Use]:
        """Returns the uses of the samples at (shard, index) places."""
        wanted = [(shard << 32) + index for shard, index in places]
        records = self.table.records
        return list(self.uses(np.isin((records["shard"].astype(np.int64) << 32) + records["index"], wanted)))


def main(argv: list[str]) -> int:
    """Prints what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train trace",
        usage="python -m eagle_train trace (KEY | --step N | --global-step N | --bad) RUN [--stage NAME] [--json]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="KEY RUN", help="a sample's key (not with an option), a run folder")
    parser.add_argument("--step", type=int, metavar="N", help="list the samples of a step of its stage, from 0")
    parser.add_argument("--global-step", type=int, metavar="N", help="list the samples of a step of the run, from 1")
    parser.add_argument("--bad", action="store_true", help="list the samples that turned out bad")
    parser.add_argument("--keys", action="store_true", help="with --bad: keys alone")
    parser.add_argument("--stage", help="of this stage alone")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    options = parser.parse_intermixed_args(argv)
    lists = [options.step is not None, options.global_step is not None, options.bad]
    if sum(lists) > 1 or len(options.names) != (1 if any(lists) else 2) or (options.keys and not options.bad):
        parser.error("give KEY and RUN, or RUN with one of --step, --global-step and --bad; --keys goes with --bad")
    if options.keys and options.json:
        parser.error("--keys and --json are two ways to print; give one of them")
    stages = open_stages(Path(options.names[-1]), options.stage)
    if options.bad:
        show_bad(stages, keys_alone=options.keys, as_json=options.json)
    elif any(lists):
        show_step(step_uses(stages, options.step, options.global_step), as_json=options.json)
    else:
        show_key(stages, options.names[0], as_json=options.json)
    return 0


def open_stages(run: Path, only: str | None) -> list[StageLedger]:
    """Returns the ledgers of a run's stages in the order they were trained.

    Raises:
        ValueError: if the run has none, or not that of stage `only`.
    """
    folder = run / "ledger"
    there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not there:
        raise ValueError(f"{run} holds no ledger; give the run_dir of a run that has begun to train")
    if only is not None and only not in there:
        raise ValueError(f"{run} has no ledger of stage {only!r}; there are {', '.join(there)}")
    records = read_run(run)
    offsets = {r["stage"]: r["step"] - r["stage_step"] for r in records.training if "stage_step" in r}
    order = list(records.config.get("schedule") or ())
    there.sort(key=lambda name: order.index(name) if name in order else len(order))
    return [StageLedger(folder=folder, stage=name, offset=offsets.get(name)) for name in there if only in (None, name)]


def step_uses(stages: Sequence[StageLedger], step: int | None, global_step: int | None) -> list[Use]:
    """Returns the uses of a step of every stage that has it.

    Raises:
        ValueError: if none has, with the steps that there are.
    """
    found: list[Use] = []
    for stage in stages:
        if step is None and stage.offset is None:
            continue
        wanted = step if step is not None else global_step - 1 - stage.offset
        found += stage.uses(stage.table.records["step"] == wanted) if wanted >= 0 else ()
    if not found:
        tables = [(s.stage, s.table.records["step"], s.offset) for s in stages if len(s.table)]
        known = ", ".join(
            f"{name} {steps.min()} to {steps.max()}"
            + ("" if offset is None else f" (global {offset + steps.min() + 1} to {offset + steps.max() + 1})")
            for name, steps, offset in tables
        )
        raise ValueError(f"no sample is on record for step {step if step is not None else global_step}; steps: {known}")
    return found


def show_step(uses: Sequence[Use], *, as_json: bool) -> None:
    """Prints the samples of a step, row by row."""
    if as_json:
        print(json.dumps([asdict(use) for use in uses]))
        return
    for title, of_step in groupby(uses, lambda use: f"{use.stage} {use.when()}"):
        print(title)
        for row, of_row in groupby(of_step, Use.where):
            print(f"  {row}")
            for use in of_row:
                print(f"    {use.key}: {use.words()}")


def show_key(stages: Sequence[StageLedger], wanted: str, *, as_json: bool) -> None:
    """Prints the history of the sample that `wanted` names, or the keys if it names several.

    Raises:
        ValueError: if it names none, with the nearest keys.
    """
    found = [(stage, stage.book.find(wanted)) for stage in stages]
    uses = {key: [] for _, places in found for key in places}
    if not uses:
        near = dict.fromkeys(key for stage in stages for key in stage.book.nearest(wanted))
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"no sample of this run's stages has the key {wanted!r}{hint}")
    if len(uses) > 1:
        show_matches(sorted(uses), as_json=as_json)
        return
    (key,) = uses
    history = [(stage.stage, stage.uses_of(places[key]) if key in places else None) for stage, places in found]
    if as_json:
        print(json.dumps({"key": key, "uses": [asdict(use) for _, of_stage in history for use in of_stage or ()]}))
        return
    print(key)
    for stage, of_stage in history:
        empty = ": not among its samples" if of_stage is None else ": in no step so far"
        print(f"  {stage}{'' if of_stage else empty}")
        for use in of_stage or ():
            print(f"    {use.when()}, {use.where()}: {use.words()}")


def show_matches(keys: Sequence[str], *, as_json: bool) -> None:
    """Prints the keys that a part of a key matches."""
    if as_json:
        print(json.dumps({"matches": list(keys)}))
        return
    print(f"{len(keys)} samples match; give one of these keys:")
    print("\n".join(f"  {key}" for key in keys[:SHOWN]))
    if len(keys) > SHOWN:
        print(f"  ... and {len(keys) - SHOWN} more; --json lists all")


def show_bad(stages: Sequence[StageLedger], *, keys_alone: bool, as_json: bool) -> None:
    """Prints each bad sample once, as a quarantine list whose comments are the reasons."""
    bad = [(stage.stage, use) for stage in stages for use in stage.bad]
    times = Counter(use.error.key for _, use in bad)
    first: dict[str, dict] = {}
    for stage, use in bad:
        told = {"reason": use.error.reason, "detail": use.error.detail, "stage": stage, "step": use.step}
        first.setdefault(use.error.key, told | {"times": times[use.error.key]})
    if as_json:
        print(json.dumps([{"key": key} | told for key, told in first.items()]))
        return
    for key, told in first.items():
        if not keys_alone:
            said = " ".join(told["detail"].split())  # a comment is one line
            seen = f"{told['stage']} step {told['step']}, {counted(told['times'], 'time')}"
            print(f"# {seen}: {told['reason']}: {said}")
        print(key)


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
