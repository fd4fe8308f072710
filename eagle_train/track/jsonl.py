"""The metrics file of a run: one JSON object per line, `{"step", "time", **metrics}`.

Strict JSON: a NaN or infinite value is `null`. It is the record the report is made from, so every line is handed
to the operating system at once: a killed process loses at most the line it was writing.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from eagle_train.track.tracker import Metrics


class JsonlTracker:
    """Appends metrics to a file, each global step's once even after a kill and a resume.

    Args:
        path: of the file; made if missing.
        resume_step: global step of the checkpoint that the run goes on from. Records of later steps are dropped:
            those steps are done again. None keeps all records.

    Raises:
        ValueError: if the file is damaged elsewhere than in its last line.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            records = read_metrics(path)
            _rewrite(path, [r for r in records if resume_step is None or r["step"] <= resume_step])
        self._file = path.open("a", encoding="utf-8")

    def begin_stage(self, stage: str, step: int, num_steps: int) -> None:
        """Writes nothing: every record of a stage names it."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Writes one line and flushes it."""
        record = {"step": step, "time": time.time()} | {name: _strict(value) for name, value in metrics.items()}
        self._file.write(_line(record))
        self._file.flush()

    def close(self, *, failed: bool = False) -> None:
        """Closes the file."""
        del failed
        self._file.close()


def end_torn_line(path: Path) -> None:
    """Ends a line of which a kill left a part, so that what is appended begins one of its own."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file in order; a last line torn by a kill is skipped.

    Raises:
        ValueError: for an unreadable line that is not the last.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            # A whole line ends with its newline: half of `"step": 120}` could still parse.
            if not line.endswith(b"\n"):
                raise ValueError("no newline")
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}: line {number} of {len(lines)} is not JSON ({error}); delete it to go on"
            ) from error
    return records


def _rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    """Replaces the file's content at once: a kill leaves the old file or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, records))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def _strict(value: float | str) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
