"""Toy data sets as pieces, a shard each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from eagle_train.data.shards import TarSample
from eagle_train.data.toy.samples import toy_sample

SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyRecords:
    """Some samples of a toy data set: from number `first` to before number `stop`.

    Args:
        kind, split, seed: see `toy_sample`.
    """

    kind: str
    split: str
    seed: int
    first: int
    stop: int

    def read(self) -> Iterator[TarSample]:
        """Yields the samples, see `pieces.Records`."""
        for index in range(self.first, self.stop):
            yield toy_sample(self.kind, self.split, index, self.seed)

    def __len__(self) -> int:
        return self.stop - self.first


def toy_records(*, kind: str, split: str, num_samples: int, seed: int) -> list[ToyRecords]:
    """Returns what each shard of a toy data set holds.

    Args:
        kind, split, seed: see `toy_sample`.
        num_samples: size of the data set.
    """
    return [
        ToyRecords(kind=kind, split=split, seed=seed, first=first, stop=min(num_samples, first + SAMPLES_PER_SHARD))
        for first in range(0, num_samples, SAMPLES_PER_SHARD)
    ]
