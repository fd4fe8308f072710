"""The quarantine list: keys of samples that a run leaves out, one a line.

`python -m eagle_train trace --bad RUN` prints such a list. A line is `<source>/<shard stem>/<tar key>` as in errors;
lines that begin with `#` and blank ones are passed over. Patterns are not read: each sample is named.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

SHOWN = 20
"""Keys listed in the warning."""


def read_quarantine(path: Path) -> frozenset[str]:
    """Returns the keys in a quarantine list.

    Raises:
        ValueError: if it cannot be read, or for a line that is no key, with its number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the quarantine list {path} cannot be read: {error}") from error
    keys = set()
    # Split at line feeds alone: a key may hold other characters that Python takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        parts = key.split("/", 2)
        if len(parts) < 3 or not all(parts):
            raise ValueError(
                f"{path}, line {number}: {key[:200]!r} is no key; write <source>/<shard stem>/<tar key>, as errors and "
                f"`trace --bad` do"
            )
        keys.add(key)
    return frozenset(keys)


def quarantined_rows(keys: Set[str], source_name: str, stem: str, shard_keys: Sequence[str]) -> np.ndarray:
    """Returns (m,) int64, increasing: the rows of a shard's index that the list names.

    Args:
        keys: full keys, as `read_quarantine` gives them.
        source_name: of the shard's source.
        stem: of the shard's file name.
        shard_keys: tar keys of the shard's samples, in the order of its index.
    """
    prefix = f"{source_name}/{stem}/"
    wanted = {key[len(prefix) :] for key in keys if key.startswith(prefix)}
    rows = [row for row, key in enumerate(shard_keys) if key in wanted] if wanted else []
    return np.array(rows, np.int64)


def report_unmatched(path: Path, keys: Set[str], matched: Set[str]) -> list[str]:
    """Returns the keys of a list that name no sample, sorted, and warns about them.

    Args:
        path: of the list.
        matched: full keys that were found in the sources.
    """
    unmatched = sorted(keys - matched)
    if unmatched:
        shown = "".join(f"\n  {key}" for key in unmatched[:SHOWN])
        more = f"\n  ... and {len(unmatched) - SHOWN} more" if len(unmatched) > SHOWN else ""
        log.warning(
            "%d of %d keys in %s name no sample of these sources (patterns are not read):%s%s",
            len(unmatched),
            len(keys),
            path,
            shown,
            more,
        )
    return unmatched
