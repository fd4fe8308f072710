"""Activation checkpointing of transformers models."""

from __future__ import annotations

from transformers import PreTrainedModel


def recompute_layers(model: PreTrainedModel) -> None:
    """Makes `model` recompute each layer's activations in the backward pass instead of keeping them."""
    # transformers 5.23 renamed it and warns about the old name, the only one that 5.17 has.
    old_name = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
