"""The checkpoints of a run on disk, and what they hold besides weights and optimizer.

They are written aside by all ranks, published by one rename, and verified before one is resumed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from eagle_train import dist
from eagle_train.track.jsonl import read_metrics
from eagle_train.train.manifest import problem, problem_of_ranks, write_manifest
from eagle_train.train.retention import Retention
from eagle_train.train.tensor_file import Written, sync

log = logging.getLogger(__name__)

PLAN = "plan.json"
STATE = "state.json"
WRITING = ".writing"
"""Ends the names of folders that are being written, or were when their run was killed."""
DELETED = ".deleted"
"""Ends the names of folders that are being deleted, or were."""
REPLACED = ".replaced"
"""Ends the names of folders whose step was saved again."""
DAMAGED = ".damaged"
"""Ends the names of folders that a run passed over and then published others; they stay."""


@dataclass(slots=True, kw_only=True)
class TrainState:
    """What a checkpoint holds besides weights, optimizer and random states."""

    stage: str
    step: int = 0
    """Optimizer steps taken in this stage."""
    global_step: int = 0
    """Optimizer steps taken over all stages."""
    tokens_seen: int = 0
    """Input tokens of samples consumed by all ranks, over all stages."""
    plan: str = ""
    """Fingerprint of the stage's plan; `plan.json` beside the state holds what it is made of."""
    cursor: dict[str, int] = field(default_factory=dict)
    """Where the stream of rows stands, see `data.stream.Cursor`; with the plan, its whole state."""
    read: dict[str, int] = field(default_factory=dict)
    """Samples of the rows so far in this stage, by source, as the plan counts them."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps of this stage, as far as `anomalies` needs them."""
    loss_sums: dict[str, list[float]] = field(default_factory=dict)
    """By source, weighted losses and weights of the steps since the last log."""
    run_id: str = ""
    """Of the tracker (W&B)."""
    config_hash: str = ""


class LostCheckpointsError(ValueError):
    """A run has checkpoints, and none of them is whole."""


class CheckpointDir:
    """The checkpoints of one run.

    Args:
        folder: of the run's checkpoints; the metrics file is beside it.
        retention: which of them stay.

    Attributes:
        passed_over: those that the last search for the newest whole one found damaged.
    """

    def __init__(self, folder: Path, retention: Retention | None = None) -> None:
        self.folder = folder
        self.retention = retention or Retention()
        self.passed_over: set[Path] = set()

    def path(self, step: int) -> Path:
        """Returns where the checkpoint of a global step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def begin(self, step: int) -> Path:
        """Makes a folder to write the checkpoint of a step into, and returns it; one process calls it.

        Raises:
            OSError: if it cannot be made.
        """
        final = self.path(step)
        aside = unused(final.with_name(f"{final.name}{WRITING}"))
        aside.mkdir(parents=True)
        return aside

    def publish(self, aside: Path, step: int, files: Mapping[str, Written]) -> Path:
        """Makes what was written the checkpoint of a step, at once; returns its folder. One process calls it.

        One that is there already is moved out of the way: it may be damaged, or of rows that were given up. After a
        kill before the new one has its name, the old one is still found, see `published`.

        Args:
            files: what every rank wrote into `aside`, already on the disk.

        Raises:
            OSError: if it cannot; one that was there already still is.
        """
        write_manifest(aside, files)
        sync(aside)
        final = self.path(step)
        before = renamed(final, DAMAGED if final in self.passed_over else REPLACED) if final.exists() else None
        try:
            aside.rename(final)
        except OSError:
            if before is not None:
                before.rename(final)
            raise
        self.passed_over.discard(final)
        sync(self.folder)
        return final

    def prune(self) -> None:
        """Deletes whole checkpoints that the retention does not keep or others replaced, and what was never finished.

        Damaged ones stay: those whose files' sizes are wrong as they are, and those that were passed over under another
        name, since new checkpoints of earlier steps would be deleted in favour of what looks whole by its sizes.
        One process calls it, while none is being written.
        """
        for path in sorted(self.passed_over):
            if path.exists():
                log.warning("%s is damaged; it stays, as %s", path, renamed(path, DAMAGED).name)
        self.passed_over.clear()
        whole = {step_of(path): path for path in self.published() if problem(path) is None}
        metrics = self.folder.parent / "metrics.jsonl"
        records = read_metrics(metrics) if self.retention.best and metrics.exists() else ()
        idle = [whole[step] for step in sorted(set(whole) - self.retention.kept(sorted(whole), records))]
        replaced = set(self.folder.glob(f"step-*{REPLACED}*")) - set(whole.values())
        idle += [path for path in sorted(replaced) if problem(path) is None]
        for path in idle:
            # One rename first: a kill in the middle leaves no half of a checkpoint under its name.
            renamed(path, DELETED)
        for left in (*self.folder.glob(f"step-*{DELETED}*"), *self.folder.glob(f"step-*{WRITING}*")):
            shutil.rmtree(left)

    def published(self) -> list[Path]:
        """Returns the published checkpoints, oldest first.

        Where a run was killed while it published a step again, that is the one which was moved out of the way.
        """
        replaced = [path for path in self.folder.glob(f"step-*{REPLACED}*") if problem(path) is None]
        found = {step_of(path): path for path in sorted(replaced)}
        found |= {step_of(path): path for path in self.folder.glob("step-*") if path.suffix == "" and path.is_dir()}
        return [found[step] for step in sorted(found)]

    def latest(self, *, thorough: bool = True, accept_none: bool = False) -> Path | None:
        """Returns the newest whole checkpoint, the same on every rank; all ranks call it. None: there never was one.

        Those that are passed over, and what is wrong with them, are warned about.

        Args:
            thorough: read every byte and compare the hashes; otherwise only sizes.
            accept_none: return None also where there are checkpoints, but none is whole.

        Raises:
            LostCheckpointsError: if there are checkpoints, but none is whole, with what is wrong with each.
        """
        published, unfinished = dist.broadcast_object(
            (self.published(), sorted(self.folder.glob(f"step-*{WRITING}*"))) if dist.rank() == 0 else None
        )
        if dist.rank() == 0:
            for path in unfinished:
                log.warning("skipping %s: it was never finished; it goes when the next one is published", path)
        troubles = []
        self.passed_over.clear()
        for path in reversed(published):
            trouble = problem_of_ranks(path, thorough=thorough)
            if trouble is None:
                return path
            troubles.append(f"{path}: {trouble}")
            self.passed_over.add(path)
            if dist.rank() == 0:
                log.warning("skipping incomplete checkpoint %s: %s; falling back to the one before", path, trouble)
        if troubles and not accept_none:
            raise LostCheckpointsError(
                f"no checkpoint is whole: {'; '.join(troubles)}. Restore one of them, or start anew at step 0 with "
                f"accept_lost_checkpoints=true or another run_dir"
            )
        return None


def step_of(path: Path) -> int:
    """Returns the global step of a published checkpoint."""
    # step-00000500, or step-00000500.replaced-1
    return int(path.name.removeprefix("step-").partition(".")[0])


def renamed(path: Path, ending: str) -> Path:
    """Gives a checkpoint the name of its step with another ending, and returns where it is then."""
    return path.rename(unused(path.with_name(f"{path.name.partition('.')[0]}{ending}")))


def unused(path: Path) -> Path:
    """Returns `path`, or `path-1`, `path-2`, ...: the first that does not exist."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def state_files(state: TrainState, config: str, plan: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the small files of a checkpoint that are this rank's to write, by name, as things stand now.

    Those are its random states, and rank 0's also the train state, the config and what the plan depends on.
    """
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state(dist.device())
    files = {random_file(): safetensors.torch.save(generators)}
    if dist.rank() == 0:
        files |= {
            PLAN: json.dumps(plan, default=str).encode(),
            STATE: json.dumps(asdict(state), indent=1).encode(),
            "config.yaml": config.encode(),
        }
    return files


def random_file() -> str:
    """Returns the name of the file of this rank's random states."""
    return f"rng-{dist.rank():05d}.safetensors"


def read_state(folder: Path) -> TrainState:
    """Returns the train state of a checkpoint."""
    return TrainState(**json.loads((folder / STATE).read_text()))


def read_plan(folder: Path) -> dict[str, Any]:
    """Returns what the plan of a checkpoint's stage depends on."""
    return json.loads((folder / PLAN).read_text())


def restore_random_states(folder: Path) -> None:
    """Restores this rank's random states; a rank that did not exist then keeps its seeded ones."""
    path = folder / random_file()
    if not path.exists():
        return
    generators = safetensors.torch.load_file(path)
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"], dist.device())


def seed_everything(seed: int) -> None:
    """Seeds Python and torch: the same on every rank, so that replicated weights start equal."""
    random.seed(seed)
    torch.manual_seed(seed)


def hash_of(text: str) -> str:
    """Returns a short SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
