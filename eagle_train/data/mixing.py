"""The mix of an epoch: how often every source comes, exactly, and which parts of its shards an epoch holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from eagle_train.data.catalog import Catalog, Source
from eagle_train.data.layout import Summary
from eagle_train.data.shuffle import shuffled, splitmix64

# Streams of random numbers, one per use.
PIECES, PASSES, PLACES = range(3)
MAX_DENOMINATOR = 1_000_000
"""Repeats are kept as fractions this fine, so that counts are integers and the same on every machine."""
MEASURES = {"samples": "num_usable", "tokens": "num_tokens", "supervised_tokens": "num_targets"}
"""What weights may count, and the sum of a source that holds it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a shard in an epoch: places `start` to `start + count` of the endless sequence of its passes.

    Pass p holds every sample of the shard once, in an order of its own; place k is in pass k // n (n samples).
    """

    shard: int
    start: int
    count: int


def repeats(sources: Sequence[Source], sums: Sequence[Summary], measure: str) -> list[Fraction]:
    """Returns the passes over each source per epoch.

    Where sources have weights, an epoch is as long as one pass over all of them, in what the weights count, and each
    source gets its share of that.

    Args:
        sums: of each source.
        measure: what weights count, one of `MEASURES`.

    Raises:
        ValueError: for an unknown measure, weights on some sources only, negative ones, or nothing to take.
    """
    if measure not in MEASURES:
        raise ValueError(f"weights over {measure!r}; known are {', '.join(MEASURES)}")
    if low := [s.name for s in sources if s.repeat < 0 or (s.weight or 0) < 0]:
        raise ValueError(f"repeat or weight of {low} is negative")
    weighted = [source.name for source in sources if source.weight is not None]
    if not weighted:
        return [Fraction(str(source.repeat)).limit_denominator(MAX_DENOMINATOR) for source in sources]
    if len(weighted) < len(sources):
        rest = [source.name for source in sources if source.weight is None]
        raise ValueError(f"{weighted} have weights and {rest} do not; give every source a weight, or none")
    sizes = [getattr(summary, MEASURES[measure]) for summary in sums]
    weights = [Fraction(str(source.weight)) for source in sources]
    if empty := [s.name for s, size, w in zip(sources, sizes, weights, strict=True) if w > 0 and size == 0]:
        raise ValueError(f"{empty} have a weight but no usable sample; set it to 0 or repair them")
    if not sum(weights):
        raise ValueError("all weights are 0; raise one")
    shares = [w / sum(weights) * sum(sizes) / max(1, size) for w, size in zip(weights, sizes, strict=True)]
    return [share.limit_denominator(MAX_DENOMINATOR) for share in shares]


def asked_shares(repeats: Sequence[Fraction], sums: Sequence[Summary], measure: str) -> list[float]:
    """Returns each source's share of an epoch in `measure`, as the repeats ask."""
    wanted = [repeat * getattr(summary, MEASURES[measure]) for repeat, summary in zip(repeats, sums, strict=True)]
    return [float(share / sum(wanted)) if sum(wanted) else 0.0 for share in wanted]


def epoch_pieces(catalog: Catalog, repeats: Sequence[Fraction], epoch: int) -> list[Piece]:
    """Returns the pieces of an epoch, shard by shard.

    A source of N samples with repeat r gives floor((e + 1) r N) - floor(e r N) samples in epoch e: what a fraction
    leaves over is made up for later, and no sample comes for the k-th time before all of its shard have come k - 1
    times.
    """
    pieces = []
    sizes = np.diff(catalog.starts)
    for source, repeat in enumerate(repeats):
        shards = np.flatnonzero(catalog.shard_sources == source)
        ends = np.cumsum(sizes[shards])
        taken = np.zeros(len(shards), dtype=np.int64)  # in the epochs before
        for earlier in range(epoch):
            taken += taken_in(ends, repeat, earlier)
        for shard, size, start, count in zip(
            shards.tolist(), sizes[shards].tolist(), taken.tolist(), taken_in(ends, repeat, epoch).tolist(), strict=True
        ):
            if not catalog.shards[shard].lost:
                pieces += split_passes(shard, size, start, count)
    return pieces


def taken_in(ends: np.ndarray, repeat: Fraction, epoch: int) -> np.ndarray:
    """Returns (number of shards,) int64: samples that an epoch takes of each shard of a source.

    Args:
        ends: (number of shards,) int64, cumulated samples.
    """
    total = int(ends[-1]) if len(ends) else 0
    phase = (epoch * repeat * total) % 1  # what earlier epochs left over
    numerator, denominator = repeat.numerator, repeat.denominator
    # floor(repeat * end + phase), in integers; the phase's denominator divides the repeat's.
    reached = (ends * numerator + int(phase * denominator)) // denominator
    return np.diff(reached, prepend=0)


def split_passes(shard: int, size: int, start: int, count: int) -> list[Piece]:
    """Returns the places `start` to `start + count` of a shard's passes as one piece per pass."""
    pieces = []
    while count:
        here = min(count, size - start % size)
        pieces.append(Piece(shard, start, here))
        start, count = start + here, count - here
    return pieces


def shuffle_pieces(catalog: Catalog, pieces: Sequence[Piece], seed: int, epoch: int) -> list[Piece]:
    """Returns the pieces in the epoch's order: shuffled within their source, every source spread evenly.

    So each window has the epoch's mix, which fills its rows better than chance does and keeps steps alike. Of n
    pieces of a source, the j-th comes at a random place in the j-th n-th part of the epoch.
    """
    pieces = [pieces[i] for i in shuffled(np.arange(len(pieces)), seed, epoch, PIECES)]
    sources = catalog.shard_sources[[piece.shard for piece in pieces]]
    jitter = (splitmix64(np.arange(len(pieces)), seed, epoch, PLACES) >> np.uint64(32)).astype(np.int64)
    places = np.empty(len(pieces), dtype=np.int64)
    for source in range(len(catalog.sources)):
        own = np.flatnonzero(sources == source)
        places[own] = ((np.arange(len(own)) << 32) + jitter[own]) // max(1, len(own))
    return [pieces[i] for i in np.argsort(places, kind="stable")]


def piece_rows(piece: Piece, size: int, seed: int) -> np.ndarray:
    """Returns (count,) int64 rows of a piece in its shard of `size` samples."""
    if piece.count == size:
        return np.arange(size)  # a whole pass: the window shuffles it anyway
    passed, place = divmod(piece.start, size)
    hashes = splitmix64(np.arange(size), seed, piece.shard, PASSES, passed)
    return np.argsort(hashes, kind="stable")[place : place + piece.count]
