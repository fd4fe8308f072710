"""Who is behind when a run is stuck, from what its ranks last told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

SHOWN = 8
"""Ranks and sample keys that a report names; the heartbeats have more."""
SAME_STEP = 2
"""Stalls in one step before, after which a job is held instead of started again."""
WAITING_IN = ("/torch/distributed/", "/deepspeed/comm/")
"""Files whose functions wait for other ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """What a rank was doing when its watchdog last looked; see `Beat`."""

    rank: int
    host: str
    node: str
    """SLURM's name of it; empty elsewhere."""
    pid: int
    phase: str
    step: int
    number: int
    seconds: float
    """It has been doing this for."""
    time: float
    """Of this look, seconds since the epoch."""
    keys: list[str]
    """Of the samples it is about; given only after an alarm."""
    where: str
    """File, line and function of the main thread."""
    waits: bool
    """Whether the main thread is in a collective."""
    answers: bool
    """Whether it was written after the alarm."""

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return asdict(self)


def waits_for_others(frame: FrameType | None) -> bool:
    """Returns whether a thread is inside a collective."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in WAITING_IN):
            return True
        frame = frame.f_back
    return False


def who_is_behind(seen: Sequence[Sighting], world_size: int) -> str:
    """Returns a report that names the ranks the others wait for, and the samples they are at."""
    told = {sighting.rank for sighting in seen}
    unseen = sorted(set(range(world_size)) - told)
    behind, why = laggards(seen)
    lines = [f"the run is stuck: {why}"]
    lines += [f"  {describe(sighting)}" for sighting in behind[:SHOWN]]
    if len(behind) > SHOWN:
        lines.append(f"  and {len(behind) - SHOWN} more ranks")
    if unseen:
        lines.append(f"  never heard of: ranks {', '.join(map(str, unseen[:SHOWN]))}")
    return "\n".join(lines)


def laggards(seen: Sequence[Sighting]) -> tuple[list[Sighting], str]:
    """Returns the ranks that are to blame, and why it is they.

    In this order: who does not answer; who is behind in what all ranks do in the same order; who is not in a
    collective while others are. If none stands out, all.
    """
    mute = [sighting for sighting in seen if not sighting.answers]
    if mute:
        return mute, "these ranks do not answer (their process holds Python's lock, or their node is gone)"
    least = min(sighting.number for sighting in seen)
    behind = [sighting for sighting in seen if sighting.number == least]
    if len(behind) < len(seen):
        return behind, "these ranks are behind, the others wait for them"
    busy = [sighting for sighting in seen if not sighting.waits]
    if busy and len(busy) < len(seen):
        return busy, "these ranks are not in a collective, the others wait for them in one"
    return behind, "all ranks are at the same point; look at the network, the storage or the GPUs"


def describe(sighting: Sighting) -> str:
    """Returns one line about a rank."""
    node = f"node {sighting.node}, " if sighting.node else ""
    keys = ", ".join(sighting.keys[:SHOWN]) or "not known"
    more = f" and {len(sighting.keys) - SHOWN} more" if len(sighting.keys) > SHOWN else ""
    return (
        f"rank {sighting.rank} ({node}host {sighting.host}, pid {sighting.pid}): {sighting.seconds:.0f} s in phase "
        f"{sighting.phase} of step {sighting.step}, at {sighting.where}; samples: {keys}{more}"
    )


def is_old(folder: Path, name: str, step: int) -> bool:
    """Returns whether the run was stuck in this step before, often enough.

    Args:
        folder: with a folder for every start of the run.
        name: of the reports in these, whose last line is `step N`.
    """
    reports = [path.read_text() for path in folder.glob(f"*/{name}")]
    steps = [int(found[-1]) for text in reports if (found := re.findall(r"^step (\d+)$", text, re.MULTILINE))]
    return steps.count(step) >= SAME_STEP
