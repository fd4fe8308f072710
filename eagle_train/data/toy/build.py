"""Builds a folder of toy shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from eagle_train.data.shards import write_shards
from eagle_train.data.toy.samples import ToySample, toy_samples


def build_toy(
    out: Path,
    *,
    kind: str,
    split: str,
    num_samples: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Writes one toy data set as shards and returns their paths.

    The shards appear all at once when they are whole: an interrupted build leaves nothing that looks done.

    Args:
        out: folder of the shards; created, and may exist only if it is empty.
        kind, split, seed: see `toy_samples`.
        num_samples: size of the data set.
        progress: called after every sample with the number of samples made so far.

    Raises:
        ValueError: if `out` already holds something, or for an unknown kind or split.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; delete it to build the data set again")
    # Shards are named after their folder, so the unfinished one has the final name in a folder of its own.
    unfinished = out.parent / f".{out.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    samples = toy_samples(kind, split, num_samples, seed)
    paths = write_shards(_counted(samples, progress) if progress else samples, unfinished / out.name)
    (unfinished / out.name).replace(out)
    unfinished.rmdir()
    return [out / path.name for path in paths]


def _counted(samples: Iterable[ToySample], progress: Callable[[int], None]) -> Iterator[ToySample]:
    """Yields the samples and reports how many there were."""
    for count, sample in enumerate(samples, start=1):
        yield sample
        progress(count)
