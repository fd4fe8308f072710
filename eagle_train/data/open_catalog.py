"""Opens the catalog of sources whose layouts are built: reads the sums of every shard, no column of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from eagle_train.data.budget import LEFT_OUT, TooManyBadSamples
from eagle_train.data.catalog import Catalog, CatalogShard, Source
from eagle_train.data.index import index_path, index_stem
from eagle_train.data.layout import Summary, from_metadata, layout_path
from eagle_train.data.locations import Location, stem
from eagle_train.data.quarantine import quarantined_rows, read_quarantine, report_unmatched
from eagle_train.data.shards import expected_shards, num_expected
from eagle_train.data.tables import read_metadata, read_table


def open_catalog(
    sources: Sequence[Source],
    layout: str,
    *,
    quarantine: Path | None = None,
    max_bad_share: float = 0.01,
    max_too_long_share: float = 1.0,
    lost: Collection[Location] = (),
) -> Catalog:
    """Returns the catalog of sources whose layouts are built.

    Args:
        layout: fingerprint of the layout.
        quarantine: list of the keys of samples to leave out.
        max_bad_share: largest share that may be bad of a source without one of its own.
        max_too_long_share: largest share of a source that may be left out because it is too long for a row.
        lost: shards that are not there; they have no layout.

    Raises:
        TooManyBadSamples: with the list.
        ValueError: if more is too long, or a shard is not the one that was laid out.
    """
    manifest = cache(expected_shards)
    shards = [
        open_shard(number, source, shard, layout, shard in lost, partial(num_expected, shard, manifest))
        for number, source in enumerate(sources)
        for shard in source.shards
    ]
    if quarantine is not None:
        shards = put_in_quarantine(sources, shards, layout, quarantine)
    catalog = Catalog(sources=sources, shards=shards, layout=layout)
    for number, (source, summary) in enumerate(zip(sources, catalog.source_summaries(), strict=True)):
        bad = sum(count for reason, count in summary.dropped.items() if reason not in LEFT_OUT)
        share = source.bad_share(max_bad_share)
        if bad > share * summary.num_samples:
            errors = [error for _, error in catalog.errors(number) if error.reason not in LEFT_OUT]
            raise TooManyBadSamples(source.name, errors, summary.num_samples, share)
        check_too_long(source.name, summary, max_too_long_share)
    return catalog


def check_too_long(source: str, summary: Summary, max_share: float) -> None:
    """Raises ValueError if rows are too short for more than a share of a source: that is rather a mistake."""
    count = summary.dropped.get("too_long", 0)
    if count > max_share * summary.num_samples:
        raise ValueError(
            f"source {source}: {count} of {summary.num_samples} samples are longer than a row and left out, more than "
            f"data.max_too_long_share={max_share:g}; raise the stage's max_length, set data.too_long to KeepTurns, or "
            f"raise data.max_too_long_share; `data stats` shows the lengths"
        )


def open_shard(
    number: int, source: Source, shard: Location, layout: str, is_lost: bool, expected: Callable[[], int]
) -> CatalogShard:
    """Returns a shard of source `number`; one that is not there has as many bad samples as its manifest says."""
    path = layout_path(index_stem(shard, source.index_dir), layout)
    if is_lost:
        count = expected() or 1
        lost = Summary(num_samples=count, dropped={"missing_shard": count})
        return CatalogShard(source=number, location=shard, index_dir=source.index_dir, summary=lost, lost=True)
    summary = from_metadata(read_metadata(path))
    wanted = expected()
    if summary.num_samples < wanted and "missing_shard" not in summary.dropped:
        raise ValueError(
            f"{shard} holds {summary.num_samples} samples, shards.json beside it says {wanted}: it was cut between two "
            f"samples, or made again; restore it, or correct shards.json"
        )
    return CatalogShard(source=number, location=shard, index_dir=source.index_dir, summary=summary)


def put_in_quarantine(
    sources: Sequence[Source], shards: Iterable[CatalogShard], layout: str, path: Path
) -> list[CatalogShard]:
    """Returns the shards with the samples that a list names left out; keys that name no sample are warned about."""
    keys = read_quarantine(path)
    prefixes = {key.rpartition("/")[0] for key in keys}
    matched: set[str] = set()
    result = []
    for shard in shards:
        prefix = f"{sources[shard.source].name}/{stem(shard.location)}"
        if not shard.lost and any(known.startswith(prefix) for known in prefixes):
            shard_keys = read_table(index_path(shard.location, shard.index_dir))["key"].to_pylist()
            rows = quarantined_rows(keys, sources[shard.source].name, stem(shard.location), shard_keys)
            matched |= {f"{prefix}/{shard_keys[row]}" for row in rows}
            shard = leave_out(shard, rows.tolist(), layout)
        result.append(shard)
    report_unmatched(path, keys, matched)
    return result


def leave_out(shard: CatalogShard, rows: Sequence[int], layout: str) -> CatalogShard:
    """Returns a shard with some of its samples in quarantine; those that are bad anyway stay what they are."""
    table = read_table(layout_path(index_stem(shard.location, shard.index_dir), layout))
    columns = {name: table[name].to_numpy() for name in ("num_tokens", "num_targets", "num_tiles")}
    rows = [row for row in rows if columns["num_tokens"][row] > 0]
    s = shard.summary
    summary = replace(
        s,
        num_usable=s.num_usable - len(rows),
        dropped=dict(Counter(s.dropped) + Counter({"quarantined": len(rows)})),
        **{name: getattr(s, name) - int(column[rows].sum()) for name, column in columns.items()},
    )
    return replace(shard, summary=summary, quarantined=tuple(rows))
