"""Keys of the ledger's samples: from (shard, index) to `<source>/<shard stem>/<tar key>` and back, by the indexes."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

import pyarrow as pa

from eagle_train.data.index import index_path
from eagle_train.data.ledger import LedgerShard
from eagle_train.data.locations import as_location
from eagle_train.data.tables import read_table

log = logging.getLogger(__name__)

WILD = frozenset("*?[")
NEAR = 5
"""Names suggested for an unknown key."""
COMPARED = 20_000
"""Keys compared with an unknown one; similarity is slow."""


def shard_keys(location: str, index_dir: str | None) -> list[str]:
    """Returns the tar keys of a shard in the order of its index.

    Raises:
        OSError: if its index is not there.
    """
    path = index_path(as_location(location), None if index_dir is None else Path(index_dir))
    try:
        return read_table(path)["key"].to_pylist()
    except pa.ArrowInvalid as error:
        raise OSError(f"{path} is no index: {error}") from error


@dataclass(frozen=True)
class KeyBook:
    """The keys of a stage's samples; indexes are read when they are first needed.

    Args:
        shards: as the ledger numbers them.
    """

    shards: Sequence[LedgerShard]
    _keys: dict[int, list[str]] = field(default_factory=dict)

    def keys(self, shard: int) -> list[str]:
        """Returns the full keys of a shard's samples; of one without an index, numbers in their place."""
        if shard not in self._keys:
            known = self.shards[shard]
            try:
                keys = shard_keys(known.location, known.index_dir)
            except OSError as error:
                log.warning("the samples of %s are numbered, not named: %s", known.location, error)
                keys = [f"sample {row} of {known.num_samples}" for row in range(known.num_samples)]
            if len(keys) != known.num_samples:
                log.warning(
                    "%s has %d samples, the run read %d: it was changed since, so keys may be others",
                    known.location,
                    len(keys),
                    known.num_samples,
                )
                keys = (keys + [f"sample {row} of {known.num_samples}" for row in range(len(keys), known.num_samples)])[
                    : known.num_samples
                ]
            self._keys[shard] = [known.prefix + key for key in keys]
        return self._keys[shard]

    def key(self, shard: int, index: int) -> str:
        """Returns the full key of a sample."""
        return self.keys(shard)[index]

    def find(self, wanted: str) -> dict[str, list[tuple[int, int]]]:
        """Returns the (shard, index) places of the keys that `wanted` names, by full key.

        A full key is itself; else it is a tar key, the end of a key after a slash, or a pattern of `*`, `?`, `[...]`.
        """
        exact = self._matching(
            (number for number, shard in enumerate(self.shards) if wanted.startswith(shard.prefix)),
            lambda key, _: key == wanted,
        )
        if exact:
            return exact
        if WILD & set(wanted):
            pattern = self._matching(range(len(self.shards)), lambda key, tar: _fits(key, tar, wanted))
            if pattern:
                return pattern
        return self._matching(range(len(self.shards)), lambda key, tar: tar == wanted or key.endswith(f"/{wanted}"))

    def nearest(self, wanted: str) -> list[str]:
        """Returns the known keys most like `wanted`."""
        prefixes = {shard.prefix: number for number, shard in enumerate(self.shards)}
        if "/" in wanted:
            prefix = "/".join(wanted.split("/")[:2]) + "/"
            close = [prefixes[name] for name in difflib.get_close_matches(prefix, list(prefixes), NEAR, 0.5)]
            names = (key for number in close for key in self.keys(number))
            return difflib.get_close_matches(wanted, list(islice(names, COMPARED)), NEAR)
        tails = ((key[len(shard.prefix) :], key) for n, shard in enumerate(self.shards) for key in self.keys(n))
        by_tail = dict(islice(tails, COMPARED))
        return [by_tail[tail] for tail in difflib.get_close_matches(wanted, list(by_tail), NEAR)]

    def _matching(self, shards: Iterable[int], fits) -> dict[str, list[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {}
        for number in shards:
            start = len(self.shards[number].prefix)
            for index, key in enumerate(self.keys(number)):
                if fits(key, key[start:]):
                    found.setdefault(key, []).append((number, index))
        return found


def _fits(key: str, tar_key: str, pattern: str) -> bool:
    return fnmatchcase(key, pattern) or fnmatchcase(tar_key, pattern)
