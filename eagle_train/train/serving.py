"""A trained model at the end of a run, ready to answer: whole on every rank where it fits, else as its weights lie."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from eagle_train import dist
from eagle_train.model.generate import WHOLE, Access
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.host_memory import room_for
from eagle_train.train.placement import Placement

log = logging.getLogger(__name__)

LEFT_FREE = 0.2
"""Share of a GPU's free memory that is left to keys, values and activations."""


@contextmanager
def served(
    placement: Placement, model: VisionLanguageModel, meta: nn.Module, whole: bool | None = None
) -> Iterator[Access]:
    """Gives access to a model's weights for generation; all ranks enter and leave together.

    Args:
        placement: of the model's weights.
        meta: the model on the meta device, for its size: sharded weights have no shapes.
        whole: every rank gets all of them, which is faster: sharded ones travel anew for every token of an answer;
            None: where every rank has room for them.
    """
    width = next(model.parameters()).element_size()
    needed = width * sum(parameter.numel() for parameter in meta.parameters())
    if fits_everywhere(needed) if whole is None else whole:
        placement.make_whole(model)
        yield WHOLE
        return
    with placement.serve(model) as access:
        if access.together and dist.rank() == 0:
            log.warning("weights, %.1f GB, stay sharded; layers are gathered for every token", needed / 1e9)
        yield access


def fits_everywhere(needed: int) -> bool:
    """Returns whether every rank has room for so many bytes on its device; all ranks call it and get the same."""
    device = dist.device()
    if device.type != "cuda":
        return room_for(needed)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return all(dist.gather_objects(needed <= (1 - LEFT_FREE) * free))
