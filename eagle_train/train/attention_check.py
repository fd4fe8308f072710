"""Before a stage: the run's attention is shown to keep the samples of a packed row apart, or the run stops."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import nn

from eagle_train import dist
from eagle_train.data.collate import pack
from eagle_train.model.attention.probe import probe_attention
from eagle_train.train.engine import Engine
from eagle_train.types import EncodedSample

LENGTHS = (37, 150, 70)
"""Tokens of the samples: none fills the kernels' blocks of 64 and 128, one is longer than a block."""


def check_attention(model: nn.Module, engine: Engine) -> None:
    """Probes the attention of a stage's model as its engine computes, and says what it is.

    Raises:
        LeakError: if it leaks.
        ValueError: if it cannot run here.
    """
    row = pack([text_sample(length) for length in LENGTHS], [], filler_id=0, tile_size=1).to(engine.device)
    body = model.llm.model
    autocast = engine.bf16 and next(body.parameters()).dtype == torch.float32
    found = probe_attention(body, model.attention, row, autocast=autocast)
    if dist.rank() == 0:
        Console(stderr=True).print(
            f"attention: {model.attention}; a sample in a row is itself alone to {found.outputs:.0e} forward, "
            f"{found.gradients:.0e} backward"
        )


def text_sample(length: int) -> EncodedSample:
    """Returns a sample without images."""
    return EncodedSample(
        key=f"probe/{length}",
        source="probe",
        input_ids=torch.zeros(length, dtype=torch.int64),
        labels=torch.zeros(length, dtype=torch.int64),
        loss_weights=torch.ones(length),
        image_positions=torch.empty(0, dtype=torch.int64),
        pixels=torch.empty(0, 3, 1, 1, dtype=torch.uint8),
    )
