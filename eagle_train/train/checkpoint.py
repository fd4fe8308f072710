"""Checkpoints: written aside by all ranks, checked, published by one rename; the newest whole one resumes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from eagle_train import dist

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PLAN = "plan.json"


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
    run_id: str = ""
    """Of the tracker (W&B)."""
    config_hash: str = ""


class CheckpointDir:
    """The checkpoints of one run.

    Args:
        folder: of the run's checkpoints.
        keep_last: whole checkpoints kept; older ones are deleted after a newer one is published.
    """

    def __init__(self, folder: Path, keep_last: int = 3) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; at least the newest checkpoint must stay")
        self.folder = folder
        self.keep_last = keep_last

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Yields a folder that every rank writes into; on leaving, it is published as `step`.

        All ranks call it. If any rank fails, nothing is published, the folder stays as it is, and every
        rank raises.

        Raises:
            OSError: if a rank could not write, with its reason.
        """
        final = self.folder / f"step-{step:08d}"
        aside = Path(dist.broadcast_object(str(unused(final.with_name(f"{final.name}.writing")))))
        if dist.rank() == 0:
            aside.mkdir(parents=True)
        dist.barrier()
        trouble = None
        try:
            yield aside
        except (OSError, RuntimeError) as error:  # torch.save raises the latter when a disk is full
            trouble = f"rank {dist.rank()}: {error}"
        troubles = [text for text in dist.gather_objects(trouble) if text]
        if troubles:
            raise OSError(f"checkpoint {final} is not published, {aside} is incomplete: {'; '.join(troubles)}")
        if dist.rank() == 0:
            publish(aside, final)
            self.prune()
        dist.barrier()

    def prune(self) -> None:
        """Deletes whole checkpoints beyond the last `keep_last`; incomplete ones are never touched."""
        whole = [path for path in self.published() if problem(path) is None]
        for path in whole[: -self.keep_last]:
            shutil.rmtree(path)

    def published(self) -> list[Path]:
        """Returns the published checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.suffix == "" and p.is_dir())

    def latest(self) -> Path | None:
        """Returns the newest complete checkpoint, the same on every rank; skipped ones are warned about."""
        chosen = None
        if dist.rank() == 0:
            for path in sorted(self.folder.glob("step-*.writing*")):
                log.warning("skipping %s: it was never finished; delete it when you like", path)
            for path in reversed(self.published()):
                if (trouble := problem(path)) is None:
                    chosen = str(path)
                    break
                log.warning("skipping incomplete checkpoint %s: %s", path, trouble)
        chosen = dist.broadcast_object(chosen)
        return Path(chosen) if chosen else None


def publish(aside: Path, final: Path) -> None:
    """Writes the manifest, makes everything durable and renames `aside` to `final`."""
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    for path in files:
        sync(path)
    sizes = {str(path.relative_to(aside)): path.stat().st_size for path in files}
    (aside / MANIFEST).write_text(json.dumps({"files": sizes}, indent=1))
    sync(aside / MANIFEST)
    if final.exists() and problem(final) is None:  # the same step was saved before: keep it
        shutil.rmtree(aside)
        return
    if final.exists():
        final.rename(unused(final.with_name(f"{final.name}.replaced")))
    aside.rename(final)
    sync(final.parent)


def problem(path: Path) -> str | None:
    """Returns what is wrong with a published checkpoint, or None if it is complete."""
    try:
        sizes = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable manifest ({error})"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def unused(path: Path) -> Path:
    """Returns `path`, or `path-1`, `path-2`, ...: the first that does not exist."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def sync(path: Path) -> None:
    """Forces a file or folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_state(folder: Path, state: TrainState, config: str, plan: Mapping[str, Any]) -> None:
    """Writes the train state, the config and what the plan depends on (rank 0), and this rank's random states."""
    if dist.rank() == 0:
        (folder / PLAN).write_text(json.dumps(plan, default=str))
        (folder / "state.json").write_text(json.dumps(asdict(state), indent=1))
        (folder / "config.yaml").write_text(config)
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state(dist.device())
    torch.save(generators, folder / f"rng-{dist.rank():05d}.pt")


def read_state(folder: Path) -> TrainState:
    """Returns the train state of a checkpoint."""
    return TrainState(**json.loads((folder / "state.json").read_text()))


def read_plan(folder: Path) -> dict[str, Any]:
    """Returns what the plan of a checkpoint's stage depends on."""
    return json.loads((folder / PLAN).read_text())


def restore_random_states(folder: Path) -> None:
    """Restores this rank's random states; a rank that did not exist then keeps its seeded ones."""
    path = folder / f"rng-{dist.rank():05d}.pt"
    if not path.exists():
        return
    generators = torch.load(path, weights_only=True)
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
