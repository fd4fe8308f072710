"""The layouts of all shards of a stage, built by its ranks together; shards that are not there are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from eagle_train.data.index import index_stem
from eagle_train.data.layout import Layout, ensure_layout, has_layout, layout_path
from eagle_train.data.locations import Location, shown
from eagle_train.data.share_work import share_work
from eagle_train.data.storage import Storage, exists


def ensure_layouts(
    shards: Sequence[tuple[Location, Path | None, str, Path | None]],
    layout: Layout,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 1,
    progress: Callable[[int], None] = lambda count: None,
    storage: Storage | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> frozenset[Location]:
    """Builds what layouts are missing, and what they need, together with the other ranks; returns when all are there.

    A remote shard whose layout is there is asked for once: whether it is there, and is the one that was laid out.

    Args:
        shards: each with the folder of its index (None: beside it), the name of its source, and the folder of files
            that its records may name (None: they may name none); the same on all ranks.
        workers: processes of this rank.
        progress: is called with the number of shards that are newly known to be ready.
        storage: how shards are read.
        stop: see `share_work`.

    Returns:
        The shards that are not there, which have none.

    Raises:
        ValueError: names the shard that it failed for; for two shards that would have one index.
    """
    refuse_shared_stems((shard, index_dir) for shard, index_dir, _, _ in shards)
    items = {layout_path(index_stem(item[0], item[1]), layout.fingerprint): item for item in shards}
    lost: set[Location] = set()

    def is_done(path: Path, item: tuple[Location, Path | None, str, Path | None]) -> bool:
        del path
        try:
            if has_layout(item[0], item[1], layout.fingerprint, item[3], storage):
                return True
            is_lost = not exists(item[0], storage)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            is_lost = True
        if is_lost:
            lost.add(item[0])
        return is_lost

    share_work(
        items,
        partial(make_layout_of, layout, storage),
        is_done,
        rank=rank,
        world_size=world_size,
        workers=workers,
        progress=progress,
        stop=stop,
    )
    return frozenset(lost)


def refuse_shared_stems(shards: Iterable[tuple[Location, Path | None]]) -> None:
    """Raises ValueError if two shards would have one index, which would then tell of one of them what the other holds.

    Args:
        shards: each with the folder of its index, None for beside it.
    """
    known: dict[Path, Location] = {}
    for shard, index_dir in shards:
        path = index_stem(shard, index_dir)
        if (other := known.setdefault(path, shard)) != shard:
            raise ValueError(
                f"{shown(other)} and {shown(shard)} would both have the index {path}: the folders that they are in are "
                f"called alike; give one of them an index_dir of its own"
            )


def make_layout_of(
    layout: Layout, storage: Storage | None, item: tuple[Location, Path | None, str, Path | None]
) -> None:
    """Makes the layout of one shard; can be sent to other processes."""
    shard, index_dir, source, media_root = item
    ensure_layout(shard, index_dir, source, layout, media_root, storage)
