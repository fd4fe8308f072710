"""How many samples of a source may turn out bad while training before the run stops with the list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from eagle_train.types import SampleError

LEFT_OUT = frozenset({"quarantined", "too_long"})
"""Reasons that are decisions of the run, about samples in which nothing is broken: no sample is bad for them."""
SHOWN = 20
"""Errors listed in the message; the exception holds all."""


class TooManyBadSamples(ValueError):
    """More than the allowed share of a source is bad.

    Args:
        source: its name.
        errors: one per bad sample.
        total: samples of the source.
        max_bad_share: the largest share of them that may be bad.
    """

    def __init__(self, source: str, errors: Sequence[SampleError], total: int, max_bad_share: float) -> None:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(e.reason for e in errors).most_common())
        shown = "\n".join(f"  {error}" for error in errors[:SHOWN])
        more = f"\n  ... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        remedy = f"more than max_bad_share={max_bad_share:g}; repair or remove them, or raise max_bad_share"
        if len(errors) <= max_bad_share * total:
            remedy = "so nothing is left of it; look at the first ones"
        super().__init__(
            f"source {source}: {len(errors)} of {total} samples are bad ({reasons}), {remedy}:\n{shown}{more}"
        )
        self.errors = tuple(errors)


class BadSampleBudget:
    """Counts distinct bad samples by source, those found in the index included.

    Args:
        sizes: samples of each source.
        max_bad_shares: largest share of each source that may be bad.
        errors: (source, error) already known.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        max_bad_shares: Mapping[str, float],
        errors: Iterable[tuple[str, SampleError]],
    ) -> None:
        self.sizes = sizes
        self.max_bad_shares = max_bad_shares
        self.bad: dict[str, dict[str, SampleError]] = {source: {} for source in sizes}
        self.add(errors)

    def add(self, errors: Iterable[tuple[str, SampleError]]) -> None:
        """Counts (source, error) pairs; a sample counts once, one that the run itself leaves out not at all."""
        for source, error in errors:
            if error.reason not in LEFT_OUT:
                self.bad[source][error.key] = error

    def check(self) -> None:
        """Raises TooManyBadSamples if a source is over its share."""
        for source, errors in self.bad.items():
            share = self.max_bad_shares[source]
            if len(errors) > share * self.sizes[source]:
                raise TooManyBadSamples(source, list(errors.values()), self.sizes[source], share)
