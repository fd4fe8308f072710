"""The ledger: which samples every step used and which it dropped. Append-only, one file per rank.

A line per row: {"attempt", "stage", "step", "used": [keys], "dropped": [[source, key, reason], ...]}. After
a resume, steps are written again under a higher attempt; on reading, the highest attempt of a step counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle_train.types import PackedBatch


class Ledger:
    """The file of one rank.

    Args:
        folder: of the run's ledger.
        rank: of this process.
        attempt: number of this start of the run, counted from 0.
    """

    def __init__(self, folder: Path, rank: int, attempt: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.attempt = attempt
        path = folder / f"rank-{rank:05d}.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:  # by a kill; the next line must not be glued to it
            self._file.write("\n")

    def record(self, stage: str, step: int, batch: PackedBatch) -> None:
        """Writes what one row used and dropped."""
        line: dict[str, Any] = {"attempt": self.attempt, "stage": stage, "step": step, "used": batch.keys}
        if batch.errors:
            line["dropped"] = [[source, error.key, error.reason] for source, error in batch.errors]
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Hands the lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_ledger(folder: Path) -> dict[tuple[str, int], list[dict]]:
    """Returns the valid lines of all ranks by (stage, step); a torn last line is skipped."""
    steps: dict[tuple[str, int], list[dict]] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # torn by a kill; its step is run again after the resume
            lines = steps.setdefault((line["stage"], line["step"]), [])
            if lines and lines[0]["attempt"] < line["attempt"]:
                lines.clear()
            if not lines or lines[0]["attempt"] == line["attempt"]:
                lines.append(line)
    return steps


def account(
    folder: Path,
    stage: str,
    num_steps: int,
    read: Mapping[str, int],
    total: Mapping[str, int],
    dropped: Mapping[str, Mapping[str, int]],
) -> dict[str, dict]:
    """Returns, by source: samples `read`, `used`, `dropped` by reason, and `pending` ones not read yet.

    In good books read = used + sum of dropped; the two sides are counted apart.

    Args:
        folder: of the ledger.
        stage: whose lines count.
        num_steps: steps done; later lines are of a lost future and do not count.
        read: samples in the rows of these steps, by source, from the plan.
        total: samples in all rows of the stage, by source.
        dropped: samples dropped from the plan, by source and reason; they count as read, once.
    """
    used: Counter[str] = Counter()
    bad = {source: Counter(reasons) for source, reasons in dropped.items()}
    for (name, step), lines in read_ledger(folder).items():
        if name == stage and step < num_steps:
            used.update(key.split("/", 1)[0] for line in lines for key in line["used"])
            for source, _, reason in (drop for line in lines for drop in line.get("dropped", ())):
                bad[source][reason] += 1
    return {
        source: {
            "read": read[source] + sum(dropped[source].values()),
            "used": used[source],
            "dropped": dict(bad[source]),
            "pending": total[source] - read[source],
        }
        for source in total
    }
