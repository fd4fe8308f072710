"""Indexes, text lengths and layouts built shard by shard, each shard by one process for all that use it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eagle_train.data.build_layouts import refuse_shared_stems
from eagle_train.data.catalog import Source
from eagle_train.data.index import ensure_index, has_index, index_path
from eagle_train.data.layout import Layout, ensure_layout
from eagle_train.data.locations import Location, shown
from eagle_train.data.shards import num_expected
from eagle_train.data.share_work import share_work
from eagle_train.data.stats import Stats, shard_stats, text_lengths
from eagle_train.data.storage import Storage, exists
from eagle_train.data.tables import read_table


@dataclass(frozen=True, slots=True)
class Work:
    """One shard of a source."""

    source: str
    shard: Location
    index_dir: Path | None
    media_root: Path | None
    layouts: tuple[int, ...] = ()
    """Numbers of its layouts among those that the processes share."""

    def __str__(self) -> str:
        return shown(self.shard)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the processes share.

    Args:
        layouts: to build.
        text_only: only their text lengths are built.
        measured: numbers of the layouts under which samples are measured.
        storage: how shards are read; None: as by default.
    """

    layouts: Sequence[Layout] = ()
    text_only: bool = False
    measured: frozenset[int] = frozenset()
    storage: Storage | None = None


@dataclass(slots=True)
class Report:
    """What was built for a shard, or for all shards of a source."""

    shards: int = 0
    made: int = 0
    """Shards whose index was not there."""
    samples: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """By reason, in the index or under the last layout."""
    seconds: float = 0.0
    """Of all processes together."""
    problems: list[str] = field(default_factory=list)
    """Shards that cannot be indexed."""
    stats: dict[int, Stats] = field(default_factory=dict)
    """Of a shard: by layout under which it is measured."""

    def add(self, other: Report) -> None:
        """Adds the report of another shard, without its stats."""
        self.shards, self.made = self.shards + other.shards, self.made + other.made
        self.samples, self.seconds = self.samples + other.samples, self.seconds + other.seconds
        self.bad += other.bad
        self.problems += other.problems


def make_works(groups: Sequence[Sequence[Source]], *, laid_out: bool = True) -> list[Work]:
    """Returns one work per shard, with the numbers of the groups of sources that it belongs to.

    Args:
        groups: the sources of each layout.
        laid_out: False: there is no layout.

    Raises:
        ValueError: for two shards that would have the same index.
    """
    users: dict[tuple[str, Location, Path | None, Path | None], list[int]] = {}
    for number, sources in enumerate(groups):
        for source in sources:
            for shard in source.shards:
                users.setdefault((source.name, shard, source.index_dir, source.media_root), []).append(number)
    works = [Work(*key, tuple(numbers) if laid_out else ()) for key, numbers in users.items()]
    refuse_shared_stems((work.shard, work.index_dir) for work in works)
    return works


def build_shard(wanted: Wanted, work: Work) -> Report:
    """Builds what is missing of one shard; one that cannot be indexed is reported, so that others are built.

    Raises:
        ValueError: if the index cannot be written.
    """
    started = time.perf_counter()
    path, root, storage = index_path(work.shard, work.index_dir), work.media_root, wanted.storage
    before = path.stat().st_mtime_ns if path.is_file() else None
    try:
        if not exists(work.shard, storage):
            count = num_expected(work.shard) or 1
            return Report(1, 0, count, Counter(missing_shard=count), problems=[f"{work} is not there"])
        index = ensure_index(work.shard, work.index_dir, media_root=root, storage=storage)
        reasons = read_table(index)["reason"].to_pylist()
        made = path.stat().st_mtime_ns != before
        stats = {}
        for number in work.layouts:
            layout = wanted.layouts[number]
            if wanted.text_only:
                text_lengths(work.shard, work.index_dir, layout, root, storage)
            else:
                path_of = ensure_layout(work.shard, work.index_dir, work.source, layout, root, storage)
                reasons = read_table(path_of)["reason"].to_pylist()
            if number in wanted.measured:
                stats[number] = shard_stats(work.shard, work.index_dir, layout, root, storage)
    except PermissionError as error:
        raise ValueError(f"{path} cannot be written ({error}); give index_dir=DIR") from error
    except (ValueError, OSError) as error:
        return Report(1, problems=[f"{work}: {error}"])
    bad = Counter(reason for reason in reasons if reason is not None)
    return Report(1, int(made), len(reasons), bad, time.perf_counter() - started, stats=stats)


def ensure_all(works: Sequence[Work], *, workers: int, progress: Callable[[int], None]) -> None:
    """Builds the indexes that are missing, together with other processes that do the same.

    Args:
        workers: processes.
        progress: is called with the number of shards that are newly known to be ready.

    Raises:
        ValueError: names the shard that it failed for.
    """
    items = {index_path(work.shard, work.index_dir): work for work in works}
    share_work(items, build_index, is_indexed, workers=workers, progress=progress)


def build_index(work: Work) -> None:
    """Builds the index of one shard; can be sent to other processes."""
    ensure_index(work.shard, work.index_dir, media_root=work.media_root)


def is_indexed(path: Path, work: Work) -> bool:
    """Returns whether the index of a shard is there and fits it."""
    del path
    return has_index(work.shard, work.index_dir, work.media_root)
