"""How many samples of a source may turn out bad while training before the run stops with the list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from eagle_train.data.catalog import TooManyBadSamples
from eagle_train.types import SampleError


class BadSampleBudget:
    """Counts distinct bad samples by source, those found in the index included.

    Args:
        sizes: samples of each source.
        max_bad_share: largest share of a source that may be bad.
        errors: (source, error) already known.
    """

    def __init__(
        self, sizes: Mapping[str, int], max_bad_share: float, errors: Iterable[tuple[str, SampleError]]
    ) -> None:
        self.sizes = sizes
        self.max_bad_share = max_bad_share
        self.bad: dict[str, dict[str, SampleError]] = {source: {} for source in sizes}
        self.add(errors)

    def add(self, errors: Iterable[tuple[str, SampleError]]) -> None:
        """Counts (source, error) pairs; a sample counts once."""
        for source, error in errors:
            self.bad[source][error.key] = error

    def check(self) -> None:
        """Raises TooManyBadSamples if a source is over its share."""
        for source, errors in self.bad.items():
            if len(errors) > self.max_bad_share * self.sizes[source]:
                raise TooManyBadSamples(source, list(errors.values()), self.sizes[source], self.max_bad_share)
