"""A model spread over a group of ranks that share its rows."""

from __future__ import annotations

import torch
import torch.distributed
from torch import nn

from eagle_train import dist
from eagle_train.model.long_rope import has_long_rope
from eagle_train.train.sequence.attention import UlyssesAttention, head_shares
from eagle_train.train.sequence.group import SequenceGroup, join
from eagle_train.train.sequence.rows import RowGroups


class Spread:
    """Makes a model attend and see together with the other ranks of its group, until it is left.

    Gradients need no more than what an engine does anyway: every rank's loss is that of its own tokens, and what it
    owes to other ranks' inputs goes back to them, so that the sum over all ranks is the whole gradient.

    Args:
        model: with `llm`, `attention` and `place_visual`; a row's part is given to it as a batch.
        size: ranks of a group; 1 leaves the model as it is.

    Raises:
        ValueError: if the ranks do not make whole groups, or a group has more ranks than the LLM has heads.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        groups = RowGroups(rank=dist.rank(), world_size=dist.world_size(), size=size)
        self.model, self.alone = model, None
        self.group: SequenceGroup | None = None
        if size > 1:
            self.alone = model.attention
            check_group(model, size)
            self.group = join(groups)
            share_rows(model, self.group)

    def leave(self) -> None:
        """Leaves the model as it was; all ranks call it."""
        if self.group is not None:
            self.model.attention, self.model.place_visual = self.alone, None
            torch.distributed.destroy_process_group(self.group.processes)
            self.group = None


def share_rows(model: nn.Module, group: SequenceGroup) -> None:
    """Makes a model attend and see together with the ranks of a group."""
    model.attention = UlyssesAttention(model.attention, group)
    model.place_visual = group.place_visual


def check_group(model: nn.Module, size: int) -> None:
    """Refuses to share a model's rows among `size` ranks where that would not be exact.

    Raises:
        ValueError: if there are more ranks than the LLM has heads, or if its rotary embedding depends on the length of
            each sample, which a part of a row does not tell.
    """
    config = model.llm.config
    head_shares(config.num_attention_heads, config.num_key_value_heads, size)
    if size > 1 and has_long_rope(model.llm):
        raise ValueError(
            f"rows of a {config.model_type} with LongRoPE cannot be shared by {size} ranks: how a sample is turned "
            "depends on all of its length; set engine.sequence_parallel=1"
        )
