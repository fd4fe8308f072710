"""The folder of a data set that is being built: what is made there stays until all of it is.

<work>/inputs                         tells from what it is made
<work>/records/<source>/000012.jsonl  the records of one shard to come
<work>/shards/<source>/               shards and indexes
<work>/reports/<source>/000012.json   what became of the records of a shard
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eagle_train.data.index import shard_identity
from eagle_train.data.share_work import Claims, Patience, claim_path
from eagle_train.data.split import RECORDS, SPLIT

PATIENCE = Patience()
INPUTS = "inputs"
TARS, SHARDS, REPORTS = "tars", "shards", "reports"
MADE = (INPUTS, SPLIT, RECORDS, TARS, SHARDS, REPORTS)
"""What is made from the inputs; other things in the folder know themselves what they are made from."""


def work_folder(data_root: Path, name: str) -> Path:
    """Returns where the data sets of a name are built."""
    return data_root / ".prepare" / name


def content_hash(path: Path) -> str:
    """Returns the hash of a file that is read whole anyway."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_version(path: Path) -> str:
    """Returns what tells a file from one that was changed since, without reading it whole: ends, size and time."""
    return f"{shard_identity(path).decode()} {path.stat().st_mtime_ns}"


@contextmanager
def at_work(work: Path, inputs: Any) -> Iterator[None]:
    """Makes the folder, emptied if it was made from other inputs; other processes wait meanwhile.

    Args:
        inputs: plain values that tell what is built, and from what.

    Raises:
        ValueError: if the folder is not writable.
    """
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {work.parent} ({error}); choose a folder that is writable") from error
    try:
        with Claims(PATIENCE) as claims:
            if not claims.take(work):
                logging.getLogger(__name__).warning("waiting for the process that holds %s", claim_path(work))
                while not claims.take(work):
                    time.sleep(PATIENCE.poll)
            _begin(work, hashlib.sha256(json.dumps(inputs).encode()).hexdigest())
            yield
    finally:
        with suppress(OSError):  # unless something is built there
            work.parent.rmdir()


def _begin(work: Path, inputs: str) -> None:
    """Removes what was made from other inputs."""
    known = work / INPUTS
    if known.is_file() and known.read_text() == inputs:
        return
    for name in MADE:
        path = work / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    work.mkdir(exist_ok=True)
    known.write_text(inputs)
