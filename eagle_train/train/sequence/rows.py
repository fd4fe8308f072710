"""Which rank has which row, and which part of it, where the ranks of a group share rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

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

    Tokens and tiles are cut as evenly as they go, wherever samples begin, but no native-resolution picture is. All that is counted of a row - tokens,
    weights, tiles, bad samples - is the same in all parts together as in the row.

    Raises:
        ValueError: if the row's tiles do not make equally many visual tokens each.
    """
    if size == 1:
        return row
    num_tokens, num_visual = row.num_tokens, len(row.image_positions)
    row = lengthened(row, size)
    bounds = even_bounds(len(row.input_ids), size)
    pictures, tiles = picture_bounds(row.grids, row.num_images, size)
    begin, end = bounds[index], bounds[index + 1]
    per_tile, rest = divmod(num_visual, max(row.num_images, 1))
    if rest:
        raise ValueError(f"{num_visual} image positions but {row.num_images} tiles, which share them unequally")
    placed = torch.searchsorted(row.image_positions, torch.tensor(bounds)).tolist()
    # A rank without tiles runs the encoders on the placeholder of its own, whatever is in it.
    pixels = row.pixels[tiles[index] : tiles[index + 1]] if tiles[index] < tiles[index + 1] else row.pixels[:1]
    return replace(
        row,
        input_ids=row.input_ids[begin:end],
        labels=row.labels[begin:end],
        loss_weights=row.loss_weights[begin:end],
        position_ids=row.position_ids[..., begin:end],
        image_positions=row.image_positions[placed[index] : placed[index + 1]] - begin,
        pixels=pixels,
        grids=row.grids[pictures[index] : pictures[index + 1]],
        num_images=tiles[index + 1] - tiles[index],
        num_tokens=max(0, min(end, num_tokens) - begin),
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


def even_bounds(total: int, parts: int) -> list[int]:
    """Returns (parts + 1) bounds that cut `total` things into runs whose lengths differ by at most 1."""
    # 7 into 3: runs of 2, 2 and 3
    return [total * part // parts for part in range(parts + 1)]


def picture_bounds(grids: Sequence[Grid], num_tiles: int, parts: int) -> tuple[list[int], list[int]]:
    """Returns (parts + 1) bounds of grids, and of tiles, that cut a row's tiles between pictures about evenly.

    Args:
        grids: of native-resolution pictures; without any, tiles are cut anywhere.
    """
    tiles = even_bounds(num_tiles, parts)
    if not grids:
        return [0] * (parts + 1), tiles
    ends = [0, *accumulate(math.prod(grid) for grid in grids)]
    pictures = [min(range(len(ends)), key=lambda place: abs(ends[place] - bound)) for bound in tiles]
    return pictures, [ends[place] for place in pictures]


def overlaps(have: tuple[int, int], bounds: Iterable[int]) -> list[int]:
    """Returns how many of the things from `have[0]` up to `have[1]` lie between each bound and the next."""
    inside = [min(max(bound, have[0]), have[1]) for bound in bounds]
    return [end - begin for begin, end in pairwise(inside)]
