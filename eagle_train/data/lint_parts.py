"""Lint of all parts of a data set by several processes; findings are kept on disk until all parts are looked at."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from eagle_train.data.lint import Finding
from eagle_train.data.lint_files import Checks, Chunk, Part, ShardWork
from eagle_train.data.media import OF_FILES
from eagle_train.data.work_pool import run_all

LINT_VERSION = 2
"""Raised when the same part gets other findings, so that none of an older version are taken."""
ODD_FILES = frozenset({"unreadable_file", "changed_media", "empty_clip", "odd_size"})
"""Findings that go with the file, beside those that make a sample bad."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
"""Of storage that knows no locks: there, looks at the same thing are not to be under way at once."""
LOCK = "lock"
"""In a folder of findings: whose look is under way holds it."""
Look = Callable[[Checks, Any], Part]
"""`lint_shard` or `lint_records`."""


def lint_parts(
    look: Look,
    checks: Checks,
    works: Iterable[ShardWork | Chunk],
    folder: Path,
    *,
    workers: int,
    num_works: int | None = None,
    progress: Callable[[int], None],
) -> Iterator[Part]:
    """Yields the findings of all parts in their order, so that they do not depend on the processes.

    They come when all parts are looked at, each from the disk: there may be more of them than memory holds.

    Args:
        folder: keeps the findings of each part until all are there; what the same look left there is taken, unless
            another one is at it.
        workers: processes.
        num_works: of parts, where it is known.
        progress: called with the number of samples of each part as it is done.
    """
    with own_folder(folder) as own:
        found: dict[int, Path] = {}
        for work, (path, count) in run_all(partial(look_once, look, checks, own), works, workers, num_works):
            found[work.number] = path
            progress(count)
        for number in sorted(found):
            yield from_json(found[number].read_text())


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Gives `folder`, or one beside it while another look has that; each is deleted at the good end of its look.

    After another end `folder` stays for the look that begins again; one beside it goes: nobody would look for it.
    """
    own, others, done = folder, 0, False
    while (held := hold(own)) is None:
        others += 1
        own = folder.with_name(f"{folder.name}-{others}")
    try:
        yield own
        done = True
    finally:
        if done or others:
            shutil.rmtree(own)
            with suppress(OSError):  # unless another look is under way
                folder.parent.rmdir()
        os.close(held)


def hold(folder: Path) -> int | None:
    """Returns a file descriptor that has a folder, made if need be, until it is closed; None: another look has it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another look is at its end
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            return None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(held)
                raise
            return held
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), (folder / LOCK).stat()):
                return held
        os.close(held)  # it was deleted meanwhile


def look_once(look: Look, checks: Checks, folder: Path, work: ShardWork | Chunk) -> tuple[Path, int]:
    """Returns where the findings of a part are, and of how many samples they are; what is there is not made again.

    Files may have been added or replaced since, so a part is looked at again that has a finding about one.
    """
    path = folder / f"{hashlib.sha256(work.identity().encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.json"
    if path.is_file():
        part = from_json(path.read_text())
        if all(finding.kind not in OF_FILES | ODD_FILES for _, finding in part.findings):
            return path, len(part.keys)
    part = look(checks, work)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    aside.write_text(to_json(part))
    aside.replace(path)
    return path, len(part.keys)


def to_json(part: Part) -> str:
    """Returns findings as text."""
    return json.dumps(asdict(part) | {"media": sorted(part.media)})


def from_json(text: str) -> Part:
    """Returns the findings that `to_json` wrote."""
    content = json.loads(text)
    findings = [(key, Finding(**finding)) for key, finding in content["findings"]]
    return Part(**content | {"findings": findings, "media": set(content["media"])})
