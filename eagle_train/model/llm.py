"""The causal language model, from transformers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from eagle_train.model.attention.packed import PACKED
from eagle_train.model.long_rope import turn_each_sample


def build_llm(*, model_type: str, pretrained: str | None = None, **config: Any) -> PreTrainedModel:
    """Returns a randomly initialized causal LM of a transformers family; see `llm_config`."""
    llm = AutoModelForCausalLM.from_config(
        llm_config(model_type, pretrained, config), dtype=torch.float32, attn_implementation=PACKED
    )
    turn_each_sample(llm)
    return llm


def llm_config(model_type: str, pretrained: str | None, config: Mapping[str, Any]) -> PreTrainedConfig:
    """Returns the configuration of an LLM.

    Args:
        model_type: as in a `config.json`: `llama`, `qwen2`, ...
        pretrained: where its weights come from: a hub id, a local folder or a file. Only kept, as
            `config.name_or_path`: whoever builds a run reads it and loads them.
        config: fields of that family's configuration.

    Raises:
        ValueError: for a field that the family does not have; transformers would take it silently.
    """
    known = set(AutoConfig.for_model(model_type).to_dict())
    if unknown := sorted(set(config) - known):
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise ValueError(f"{model_type} has no field {unknown}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return AutoConfig.for_model(model_type, name_or_path=pretrained or "", **config)
