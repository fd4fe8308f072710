"""Which rank has which row, and which part of it, where the ranks of a group share rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from eagle_train.data.collate import count_targets
from eagle_train.data.stream import Step
from eagle_train.types import IGNORE_INDEX, Grid, PackedBatch, RowPart


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroups:
    """Ranks in groups of neighbours that read the same rows.

    Args:
        rank: of this process.
        world_size: number of ranks.
        size: R, ranks of a group; 1: every rank reads rows of its own.

    Raises:
        ValueError: if the ranks do not make whole groups.
    """

    rank: int
    world_size: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.world_size % self.size:
            raise ValueError(
                f"{self.world_size} ranks do not make groups of engine.sequence_parallel={self.size}; choose a number "
                f"of ranks that is a multiple of it"
            )

    @property
    def index(self) -> int:
        """This rank's place in its group."""
        return self.rank % self.size

    @property
    def data_rank(self) -> int:
        """Number of the group: which rows of a step it reads."""
        return self.rank // self.size

    @property
    def data_world_size(self) -> int:
        """Number of groups, over which the rows of a step are dealt."""
        return self.world_size // self.size

    def own_parts(self, steps: Iterable[tuple[Step, list[PackedBatch]]]) -> Iterator[tuple[Step, list[PackedBatch]]]:
        """Yields steps with this rank's part of each row of its group."""
        for step, rows in steps:
            yield step, [own_part(row, self.index, self.size) for row in rows]


def own_part(row: PackedBatch, index: int, size: int) -> PackedBatch:
    """Returns the part of a row that rank `index` of a group of `size` has.

    Tokens and tiles are cut as evenly as they go, wherever samples begin. All that is counted of a row - tokens,
    weights, tiles, bad samples - is the same in all parts together as in the row.

    Raises:
        ValueError: if the row's tiles do not make equally many visual tokens each.
    """
    if size == 1:
        return row
    num_tokens, num_visual = row.num_tokens, len(row.image_positions)
    row = lengthened(row, size)
    bounds, tiles = even_bounds(len(row.input_ids), size), tile_bounds(row, size)
    begin, end = bounds[index], bounds[index + 1]
    per_tile, rest = divmod(num_visual, max(row.num_images, 1))
    if rest:
        raise ValueError(f"{num_visual} image positions but {row.num_images} tiles, which share them unequally")
    placed = torch.searchsorted(row.image_positions, torch.tensor(bounds)).tolist()
    # A rank without tiles runs the encoders on the placeholder of its own, whatever is in it.
    seen = (tiles[index], tiles[index + 1]) if tiles[index] < tiles[index + 1] else (0, 1)
    return replace(
        row,
        input_ids=row.input_ids[begin:end],
        labels=row.labels[begin:end],
        loss_weights=row.loss_weights[begin:end],
        position_ids=row.position_ids[..., begin:end],
        image_positions=row.image_positions[placed[index] : placed[index + 1]] - begin,
        pixels=row.pixels[slice(*seen)],
        grids=grids_within(row.grids, *seen),
        num_images=tiles[index + 1] - tiles[index],
        num_tokens=max(0, min(end, num_tokens) - begin),
        num_targets=count_targets(row.labels[begin:end]),
        errors=row.errors if index == 0 else (),
        part=RowPart(
            index=index,
            begin=begin,
            made=tuple(per_tile * bound for bound in tiles),
            placed=tuple(placed),
        ),
    )


def lengthened(row: PackedBatch, length: int) -> PackedBatch:
    """Returns a row of at least `length` tokens: no rank may be without one. What is added weighs nothing.

    It is a sample of its own, without a key, as the one token of an empty row is.
    """
    more = length - len(row.input_ids)
    if more <= 0:
        return row
    return replace(
        row,
        input_ids=torch.cat([row.input_ids, row.input_ids[-1:].expand(more)]),
        labels=torch.cat([row.labels, row.labels.new_full((more,), IGNORE_INDEX)]),
        loss_weights=torch.cat([row.loss_weights, row.loss_weights.new_zeros(more)]),
        position_ids=torch.cat(
            [row.position_ids, torch.arange(more).expand(*row.position_ids.shape[:-1], more)], dim=-1
        ),
        cu_seqlens=torch.cat([row.cu_seqlens, row.cu_seqlens.new_tensor([length])]),
        segment_lengths=(*row.segment_lengths, more),
        max_seqlen=max(row.max_seqlen, more),
    )


def tile_bounds(row: PackedBatch, size: int) -> list[int]:
    """Returns (size + 1) bounds that share a row's tiles; of pictures of native resolution, near the ends of frames.

    Encoders see a frame whole, and every frame by itself.
    """
    bounds = even_bounds(row.num_images, size)
    if not row.grids:
        return bounds
    ends = [0, *accumulate(rows * cols for steps, rows, cols in row.grids for _ in range(steps))]
    return [min(ends, key=lambda end: abs(end - bound)) for bound in bounds]


def grids_within(grids: Sequence[Grid], begin: int, end: int) -> tuple[Grid, ...]:
    """Returns the grids of the tiles from `begin` to `end`, which are at ends of frames; of a part of one, a tile's."""
    found, first = [], 0
    for steps, rows, cols in grids:
        (inside,) = overlaps((begin, end), (first, first + steps * rows * cols))
        whole, rest = divmod(inside, rows * cols)
        found += [(whole, rows, cols)] * (whole > 0) + [(1, 1, rest)] * (rest > 0)
        first += steps * rows * cols
    return tuple(found)


def even_bounds(total: int, parts: int) -> list[int]:
    """Returns (parts + 1) bounds that cut `total` things into runs whose lengths differ by at most 1."""
    # 7 into 3: runs of 2, 2 and 3
    return [total * part // parts for part in range(parts + 1)]


def overlaps(have: tuple[int, int], bounds: Iterable[int]) -> list[int]:
    """Returns how many of the things from `have[0]` up to `have[1]` lie between each bound and the next."""
    inside = [min(max(bound, have[0]), have[1]) for bound in bounds]
    return [end - begin for begin, end in pairwise(inside)]
