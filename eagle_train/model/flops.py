"""Floating-point operations of a forward pass, 2 per multiply-add, counted on the meta device."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_train.model.flop_counter import FlopCounter
from eagle_train.model.token_mlp import MLP, last_parts


def count_flops(
    module: nn.Module, *inputs: torch.Tensor, seen: dict[Hashable, Any] | None = None, **arguments: Any
) -> int:
    """Returns the FLOPs of `module(*inputs, **arguments)`; all of it on the meta device.

    Args:
        seen: see `FlopCounter`; to be shared by counts of modules that have parts in common.
    """
    with torch.no_grad(), FlopCounter({} if seen is None else seen) as counter:
        module(*inputs, **arguments)
    return counter.total()


def target_flops(llm: PreTrainedModel) -> int:
    """Returns the FLOPs of what tokens without a label need not have, for one token: see `token_mlp` and `LossHead`.

    Args:
        llm: on the meta device; of a vision-language model.
    """
    hidden = torch.zeros(1, llm.config.hidden_size, device="meta")
    parts = [llm.get_output_embeddings(), last_parts(llm).get(MLP)]
    return sum(count_flops(part, hidden) for part in parts if part is not None)


def llm_flops(llm: PreTrainedModel, length: int) -> int:
    """Returns the FLOPs of the LLM and its head for one row of `length` tokens of a single sample.

    Packed rows of shorter samples cost less in attention. A causal kernel's attention is counted in full,
    as if it were not causal.

    Args:
        llm: on the meta device.
    """
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    # A ready 4-D mask: making one would look at values, which meta tensors do not have.
    mask = torch.zeros(1, 1, length, length, device="meta")
    return count_flops(llm, input_ids=ids, attention_mask=mask, use_cache=False)
