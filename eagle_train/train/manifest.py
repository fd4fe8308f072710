"""Whether the files of a checkpoint are those that were written: their sizes, and the hashes of their content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eagle_train import dist
from eagle_train.train.tensor_file import Written, hash_of_file, write_bytes

MANIFEST = "manifest.json"
HASHING_THREADS = 4


def write_manifest(folder: Path, files: Mapping[str, Written]) -> None:
    """Writes down the files of a checkpoint."""
    known = {name: {"bytes": file.size, "sha256": file.sha256} for name, file in sorted(files.items())}
    write_bytes(folder / MANIFEST, json.dumps({"files": known}, indent=1).encode())


def read_manifest(path: Path) -> dict[str, Written]:
    """Returns the files of a published checkpoint by name."""
    files = json.loads((path / MANIFEST).read_text())["files"]
    return {name: Written(size=known["bytes"], sha256=known["sha256"]) for name, known in files.items()}


def problem(path: Path) -> str | None:
    """Returns what is wrong with a published checkpoint by its files' sizes, or None if it is complete."""
    try:
        files = read_manifest(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable manifest of this version ({error})"
    for name, known in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != known.size:
            return f"{name} has {file.stat().st_size} bytes instead of {known.size}"
    return None


def problem_of_ranks(path: Path, *, thorough: bool) -> str | None:
    """Returns what is wrong with a published checkpoint, or None, the same on every rank; all ranks call it.

    Args:
        thorough: by its content, not only by its files' sizes. The ranks share the files among them, and each reads
            several at once.
    """
    trouble = dist.broadcast_object(problem(path) if dist.rank() == 0 else None)
    if trouble is not None or not thorough:
        return trouble
    files = read_manifest(path)
    mine = sorted(files, key=lambda name: -files[name].size)[dist.rank() :: dist.world_size()]

    def damaged(name: str) -> str | None:
        try:
            found = hash_of_file(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error})"
        return None if found == files[name].sha256 else f"{name} is damaged: its SHA-256 is {found[:16]}..."

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        found = [trouble for trouble in pool.map(damaged, mine) if trouble]
    all_found = [trouble for of_rank in dist.gather_objects(found) for trouble in of_rank]
    return "; ".join(all_found) or None
