"""The causal language model, from transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def build_llm(*, model_type: str, **config: Any) -> PreTrainedModel:
    """Returns a randomly initialized causal LM of a transformers family.

    Args:
        model_type: as in a `config.json`: `llama`, `qwen2`, ...
        config: fields of that family's configuration.
    """
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32)
