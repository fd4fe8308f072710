"""The processes that share rows, and what they hand each other: a differentiable all-to-all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch.autograd.function import once_differentiable

from eagle_train.train.sequence.rows import RowGroups, overlaps
from eagle_train.types import RowPart


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceGroup:
    """The ranks that share rows with this one.

    Args:
        index: this rank's place among them.
        size: how many they are.
        processes: joins them; None: on the meta device, where nothing is handed over but counted.
    """

    index: int
    size: int
    processes: torch.distributed.ProcessGroup | None

    def exchange(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Returns what the ranks sent to this one, (sum(receive), ...), in their order; gradients go the way back.

        All ranks of the group call it together, in the forward pass and, where `rows` asks for a gradient on any, in
        the backward pass: so it must ask on all or on none.

        Args:
            rows: (sum(send), ...), those for rank 0 first.
            send: how many of them go to each rank.
            receive: how many come from each.
        """
        return Exchange.apply(rows, list(send), list(receive), self.processes)

    def place_visual(self, tokens: torch.Tensor, part: RowPart) -> torch.Tensor:
        """Returns the visual tokens (M, H) that stand in this rank's part, of those that all ranks made.

        Each goes to the one rank that needs it, and its gradient comes back to the rank that made it.

        Args:
            tokens: (M', H), of this rank's own tiles; without a tile none, but with a graph.

        Raises:
            ValueError: if they are not as many as were planned.
        """
        planned = part.made[self.index + 1] - part.made[self.index]
        if planned != len(tokens) or part.made[-1] != part.placed[-1]:
            raise ValueError(
                f"{part.placed[-1]} image positions but {part.made[-1]} visual tokens in the row; this rank's tiles "
                f"made {len(tokens)} of {planned}"
            )
        if part.made[-1] == 0:
            return tokens
        send = overlaps((part.made[self.index], part.made[self.index + 1]), part.placed)
        receive = overlaps((part.placed[self.index], part.placed[self.index + 1]), part.made)
        return self.exchange(tokens, send, receive)


def join(groups: RowGroups) -> SequenceGroup:
    """Returns this rank's group; all ranks of the run call it together."""
    mine = None
    for first in range(0, groups.world_size, groups.size):  # every rank takes part in making every group
        made = torch.distributed.new_group(list(range(first, first + groups.size)))
        mine = made if first <= groups.rank < first + groups.size else mine
    return SequenceGroup(index=groups.index, size=groups.size, processes=mine)


class Exchange(torch.autograd.Function):
    """`all_to_all_single` along the first dimension, whose gradient is the same with both directions changed over."""

    @staticmethod
    def forward(
        ctx, rows: torch.Tensor, send: list[int], receive: list[int], processes: torch.distributed.ProcessGroup
    ) -> torch.Tensor:
        """Returns what came, see `SequenceGroup.exchange`."""
        ctx.way_back = (receive, send, processes)
        return all_to_all(rows, send, receive, processes)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Returns the gradients of what was sent."""
        return all_to_all(gradient, *ctx.way_back), None, None, None


def all_to_all(
    rows: torch.Tensor, send: list[int], receive: list[int], processes: torch.distributed.ProcessGroup | None
) -> torch.Tensor:
    """Returns what the ranks of a group sent to this one."""
    came = rows.new_empty(sum(receive), *rows.shape[1:])
    if rows.device.type != "meta":  # whose tensors hold nothing; they are here to be counted
        torch.distributed.all_to_all_single(came, rows.contiguous(), receive, send, group=processes)
    return came
