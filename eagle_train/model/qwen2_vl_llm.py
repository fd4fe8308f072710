"""Qwen2-VL's language model by itself: a Qwen 2 whose rotary positions are those of time, rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin, Qwen2VLTextConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLPreTrainedModel, Qwen2VLTextModel

from eagle_train.model.attention.packed import PACKED
from eagle_train.model.llm import llm_config


class Qwen2VLCausalLM(Qwen2VLPreTrainedModel, GenerationMixin):
    """transformers' text model with an LM head; transformers has it as a part of the whole model alone.

    Position ids are given, (4, B, T), in training and generation: see `data.positions`. Those that transformers works
    out itself overlap after a video that has more steps than rows and columns (5.23).
    """

    config: Qwen2VLTextConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Qwen2VLTextConfig) -> None:
        super().__init__(config)
        self.model = Qwen2VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Returns logits (B, T, V), or (B, k, V) of the last k positions.

        Args:
            input_ids: (B, T) int64, or `inputs_embeds` (B, T, H).
            attention_mask: (B, T), 0 where there is padding; of packed rows see `packed_arguments`.
            position_ids: (4, B, T) int64; None: those of text, which count from 0.
            past_key_values, use_cache: of generation.
            logits_to_keep: k; 0: all.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **arguments,
        )
        hidden = output.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


def build_qwen2_vl_llm(
    *, pretrained: str | None = None, tie_word_embeddings: bool = False, **config: Any
) -> Qwen2VLCausalLM:
    """Returns a randomly initialized language model of Qwen2-VL.

    Args:
        pretrained: see `llm_config`; a folder or hub id of the whole Qwen2-VL will do.
        tie_word_embeddings: whether the LM head is the table of embeddings; transformers has it in the whole model's
            configuration.
        config: fields of transformers' `Qwen2VLTextConfig`.

    Raises:
        ValueError: for a field that it does not have.
    """
    known = llm_config("qwen2_vl_text", pretrained, config)
    known.tie_word_embeddings = tie_word_embeddings
    known._attn_implementation = PACKED
    return Qwen2VLCausalLM(known)
