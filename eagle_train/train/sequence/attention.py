"""Attention of rows that are shared by a group of ranks: each rank computes some heads of the whole row.

DeepSpeed has the same (Ulysses, `UlyssesSPAttentionHF`), but not for rows as ours: it asks for parts of equal length,
drops masks and finds samples by gathering `position_ids` in every layer, asks that heads and key-value heads divide
the group or the other way round, and takes the place of transformers' own attention for the whole process.

Shape letters: T tokens of the row, t those of this rank, h heads of this rank, k key-value heads for them, D of a head.

Source: DeepSpeed-Ulysses (arXiv 2309.14509), ALST (arXiv 2506.13996).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from eagle_train.model.attention.backend import AttentionBackend, Segments
from eagle_train.model.attention.limits import cast
from eagle_train.train.sequence.group import SequenceGroup
from eagle_train.train.sequence.rows import even_bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShare:
    """Which heads of the row's attention a rank computes."""

    queries: tuple[int, int]
    """First query head and the one after the last."""
    keys: tuple[int, int]
    """The key-value heads that these query heads need."""
    key_of: tuple[int, ...] | None
    """Of each query head its key-value head, counted from `keys[0]`; None where equal runs of query heads share one,
    as kernels expect it."""

    @property
    def width(self) -> int:
        """Heads of queries, keys and values together."""
        return self.queries[1] - self.queries[0] + 2 * (self.keys[1] - self.keys[0])


def head_shares(num_heads: int, num_key_value_heads: int, ranks: int) -> list[HeadShare]:
    """Returns what each rank computes: as equally many query heads as it goes, and whatever keys and values they need.

    A key-value head goes to every rank that needs it: there may be fewer of them than ranks.

    Raises:
        ValueError: if there are more ranks than heads.
    """
    if num_heads < ranks:
        raise ValueError(
            f"attention of {num_heads} heads cannot be shared by {ranks} ranks: each needs a head; choose "
            f"engine.sequence_parallel={num_heads} or less"
        )
    groups = num_heads // num_key_value_heads
    bounds = even_bounds(num_heads, ranks)
    shares = []
    for queries in pairwise(bounds):
        keys = (queries[0] // groups, (queries[1] - 1) // groups + 1)
        key_of = tuple(head // groups - keys[0] for head in range(*queries))
        run = len(key_of) // (keys[1] - keys[0])
        regular = key_of == tuple(place // run for place in range(len(key_of)))
        shares.append(HeadShare(queries=queries, keys=keys, key_of=None if regular else key_of))
    return shares


class UlyssesAttention:
    """An attention backend for rows shared by a group: trades parts of the row for heads, and back.

    Args:
        backend: attends within the whole row.
        group: shares the row.
    """

    def __init__(self, backend: AttentionBackend, group: SequenceGroup) -> None:
        self.backend = backend
        self.group = group

    def __str__(self) -> str:
        return f"{self.backend} for {self.group.size} ranks"

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        *,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        """Returns attention (t, heads, D) of this rank's tokens.

        Args:
            query: (t, heads, D).
            key, value: (t, key-value heads, D).
            segments: of the whole row.
        """
        query, key, value = cast(query, key, value)  # to the same dtype: they travel together
        size, index = self.group.size, self.group.index
        shares = head_shares(query.shape[1], key.shape[1], size)
        bounds = even_bounds(sum(segments.lengths), size)
        parts = [end - begin for begin, end in pairwise(bounds)]
        own = shares[index]
        sent = [
            torch.cat([query[:, slice(*s.queries)], key[:, slice(*s.keys)], value[:, slice(*s.keys)]], dim=1)
            for s in shares
        ]
        whole = self.group.exchange(
            torch.cat([piece.flatten(0, 1) for piece in sent]),
            send=[parts[index] * share.width for share in shares],
            receive=[part * own.width for part in parts],
        ).unflatten(0, (-1, own.width))
        num_queries, num_keys = own.queries[1] - own.queries[0], own.keys[1] - own.keys[0]
        query_ThD, key_TkD, value_TkD = whole.split([num_queries, num_keys, num_keys], dim=1)
        if own.key_of is not None:
            key_TkD, value_TkD = key_TkD[:, own.key_of], value_TkD[:, own.key_of]
        out = self.backend(query_ThD, key_TkD, value_TkD, segments, scale=scale, causal=causal)
        counts = [share.queries[1] - share.queries[0] for share in shares]
        back = self.group.exchange(
            out.flatten(0, 1),
            send=[part * num_queries for part in parts],
            receive=[parts[index] * count for count in counts],
        )
        pieces = back.split([parts[index] * count for count in counts])
        return torch.cat([piece.unflatten(0, (parts[index], -1)) for piece in pieces], dim=1)
