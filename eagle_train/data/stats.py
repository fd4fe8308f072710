"""How long samples are and what media they have: exact distributions, summed up shard by shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from eagle_train.data.index import ensure_index
from eagle_train.data.layout import Layout
from eagle_train.data.lengths import ensure_lengths
from eagle_train.data.locations import Location
from eagle_train.data.media import MediaError
from eagle_train.data.storage import Storage
from eagle_train.data.tables import read_table
from eagle_train.types import Media, MediaPlan

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
MEASURED = (
    "text_tokens",
    "tokens",
    "supervised_tokens",
    "answers",
    "images",
    "videos",
    "documents",
    "tiles",
    "degraded",
    "image_width",
    "image_height",
    "image_tiles",
    "video_frames",
    "document_pages",
)
"""What is measured: of each sample, but for the last five, which are of each medium (pixels, tiles and frames chosen).

A sample is degraded (1, not 0) if a row of its length leaves less to its media than they ask for."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """How often each whole number came; exact, and small, as numbers of one kind repeat."""

    values: np.ndarray
    """(k,) int64, increasing."""
    counts: np.ndarray
    """(k,) int64."""

    @classmethod
    def of(cls, numbers: Sequence[int] | np.ndarray) -> Distribution:
        """Returns the distribution of some numbers."""
        values, counts = np.unique(np.asarray(numbers, dtype=np.int64), return_counts=True)
        return cls(values, counts.astype(np.int64))

    def plus(self, other: Distribution) -> Distribution:
        """Returns the distribution of both together."""
        values, places = np.unique(np.concatenate([self.values, other.values]), return_inverse=True)
        counts = np.zeros(len(values), dtype=np.int64)
        np.add.at(counts, places, np.concatenate([self.counts, other.counts]))
        return Distribution(values, counts)

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Sum of all numbers."""
        return int((self.values * self.counts).sum())

    def percentile(self, percent: float) -> int:
        """Returns the smallest number that at least `percent` of the numbers do not exceed."""
        rank = max(1, int(np.ceil(percent / 100 * len(self))))
        return int(self.values[np.searchsorted(np.cumsum(self.counts), rank)])

    def describe(self) -> dict[str, float]:
        """Returns count, sum, mean, percentiles and extremes; only the count if there is no number."""
        if not len(self):
            return {"count": 0}
        found = {"count": len(self), "sum": self.total, "mean": self.total / len(self), "min": int(self.values[0])}
        found |= {f"p{percent}": self.percentile(percent) for percent in PERCENTILES}
        return found | {"max": int(self.values[-1])}

    def histogram(self) -> list[tuple[int, int, int]]:
        """Returns (first, last, count) of bins between powers of two, without empty ones at the ends."""
        if not len(self):
            return []
        exponents = np.floor(np.log2(np.maximum(self.values, 0.5))).astype(int)  # 0 is alone, in bin -1
        bins = []
        for exponent in range(int(exponents[0]), int(exponents[-1]) + 1):
            first, last = (0, 0) if exponent < 0 else (2**exponent, 2 ** (exponent + 1) - 1)
            bins.append((first, last, int(self.counts[exponents == exponent].sum())))
        return bins


Stats = Mapping[str, Distribution]
"""By what is measured, see `MEASURED`."""


def merge(one: Stats, other: Stats) -> Stats:
    """Returns the stats of both together."""
    return {name: one[name].plus(other[name]) for name in MEASURED}


def no_stats() -> Stats:
    """Returns the stats of nothing."""
    return {name: Distribution.of([]) for name in MEASURED}


def text_lengths(
    shard: Location,
    index_dir: Path | None,
    layout: Layout,
    media_root: Path | None = None,
    storage: Storage | None = None,
) -> pa.Table:
    """Returns the text lengths of a shard up to each answer, from disk if they were counted before."""
    return read_table(ensure_lengths(shard, index_dir, layout.text, media_root, storage))


def shard_stats(
    shard: Location,
    index_dir: Path | None,
    layout: Layout,
    media_root: Path | None = None,
    storage: Storage | None = None,
) -> Stats:
    """Returns the stats of a shard's samples, those too long for a row included, the other bad ones not."""
    texts = text_lengths(shard, index_dir, layout, media_root, storage)
    index = read_table(ensure_index(shard, index_dir, media_root=media_root, storage=storage))
    encoder = layout.encoder
    found: dict[str, list[int]] = {name: [] for name in MEASURED}
    columns = [index[name].to_pylist() for name in ("media", "reason")]
    columns += [texts[name].to_pylist() for name in ("num_tokens", "num_targets")]
    for rows, reason, num_tokens, num_targets in zip(*columns, strict=True):
        if reason is not None:
            continue
        media = [Media(**row) for row in rows]
        try:
            asked, _ = encoder.plan_media(media)
            plans, media_tokens = encoder.plan_media(media, layout.max_length - num_tokens[-1])
        except MediaError:  # larger than the run's policy allows
            continue
        kinds = [medium.kind for medium in media]
        sample = {
            "text_tokens": num_tokens[-1],
            "tokens": num_tokens[-1] + media_tokens,
            "supervised_tokens": num_targets[-1],
            "answers": len(num_tokens),
            "images": kinds.count("image"),
            "videos": kinds.count("video"),
            "documents": kinds.count("document"),
            "tiles": sum(plan.num_tiles for plan in plans),
            "degraded": int(plans != asked),
        }
        for name, value in sample.items():
            found[name].append(value)
        for medium, plan in zip(media, plans, strict=True):
            for name, value in medium_stats(medium, plan).items():
                found[name].append(value)
    return {name: Distribution.of(numbers) for name, numbers in found.items()}


def medium_stats(medium: Media, plan: MediaPlan) -> dict[str, int]:
    """Returns what is measured of one medium."""
    if medium.kind == "image":
        return {"image_width": medium.width, "image_height": medium.height, "image_tiles": plan.num_tiles}
    return {"video_frames" if medium.kind == "video" else "document_pages": plan.num_frames}
