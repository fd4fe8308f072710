"""Catalogs for tests: of real shards, and of made-up lengths without any shard behind them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from eagle_train.data.balance import CostModel
from eagle_train.data.catalog import Catalog, CatalogShard, Source
from eagle_train.data.encode import Encoder
from eagle_train.data.index import index_stem
from eagle_train.data.layout import SampleLayout, ensure_layout, layout_path, layout_table, to_metadata
from eagle_train.data.open_catalog import open_catalog
from eagle_train.data.plan import PlanConfig
from eagle_train.data.tables import write_table
from eagle_train.data.too_long import DropTooLong, TooLong
from eagle_train.train.stage_data import make_layout
from eagle_train.types import MediaPlan, SampleError

FLAT = CostModel(per_token=1e3)


def read_catalog(
    sources: Sequence[Source],
    encoder: Encoder,
    max_length: int,
    too_long: TooLong | None = None,
    share: float = 1.0,
    quarantine: Path | None = None,
) -> Catalog:
    """Returns the catalog of sources with real shards."""
    layout = make_layout(encoder, max_length, too_long or DropTooLong())
    for source in sources:
        for shard in source.shards:
            if shard.exists():
                ensure_layout(shard, source.index_dir, source.name, layout, source.media_root)
    return open_catalog(sources, layout.fingerprint, max_bad_share=share, quarantine=quarantine)


def made_up_catalog(
    folder: Path,
    sizes: Sequence[int] = (300, 120),
    shard_size: int = 50,
    repeats: Sequence[float] = (1.0, 1.0),
    weights: Sequence[float | None] = (None, None),
    bad: Sequence[int] = (),
    lengths: np.ndarray | None = None,
) -> Catalog:
    """Returns sources of random lengths (20 to 299 tokens) in shards of `shard_size`; nothing can be read of them.

    Args:
        bad: numbers of samples that cannot be used.
        lengths: tokens of each sample instead.
    """
    rng = np.random.default_rng(1)
    lengths = rng.integers(20, 300, size=sum(sizes)) if lengths is None else lengths
    sources, shards, start = [], [], 0
    for number, (size, repeat, weight) in enumerate(zip(sizes, repeats, weights, strict=True)):
        here = [folder / f"s{number}-{k:03d}.tar" for k in range(-(-size // shard_size))]
        sources.append(Source(name=f"s{number}", shards=here, repeat=repeat, weight=weight))
        for place, shard in enumerate(here):
            first = start + place * shard_size
            rows = [
                made_up_row(n, int(lengths[n]), n in bad) for n in range(first, min(first + shard_size, start + size))
            ]
            table, summary = layout_table(rows, f"digest of {shard.name}")
            path = layout_path(index_stem(shard, None), "x")
            write_table(table.replace_schema_metadata(to_metadata(summary)), path)
            shards.append(CatalogShard(source=number, location=shard, index_dir=None, summary=summary))
        start += size
    return Catalog(sources=sources, shards=shards, layout="x")


def made_up_row(number: int, length: int, bad: bool) -> SampleLayout | SampleError:
    """Returns the layout of a sample, every third one with a tile."""
    if bad:
        return SampleError(f"s/{number}", "bad_record", "made up")
    media = (MediaPlan(),) if number % 3 == 0 else ()
    return SampleLayout(num_tokens=length, num_targets=length // 2, media=media, num_answers=1)


def plan_config(catalog: Catalog, **changes) -> PlanConfig:
    """Returns the plan of one epoch of a catalog in rows of 512 tokens, 4 of them per step."""
    repeats = tuple(Fraction(str(source.repeat)) for source in catalog.sources)
    values = {"max_length": 512, "rows_per_step": 4, "window_rows": 20, "num_epochs": 1, "cost": FLAT}
    return PlanConfig(**{"repeats": repeats} | values | changes)
