"""How packed rows pass through transformers' models, by its public interface for attention."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eagle_train.model.attention.backend import AttentionBackend, Segments
from eagle_train.model.long_rope import check_part
from eagle_train.types import PackedBatch

PACKED = "eagle_packed"
"""Name under which `packed_attention` is registered; a config's `_attn_implementation`."""

NOT_SUPPORTED = ("softcap", "s_aux")
"""Arguments of some families' layers that change what attention is; no backend here knows them."""


def packed_hidden(
    llm: PreTrainedModel,
    embeddings: torch.Tensor,
    batch: PackedBatch,
    backend: AttentionBackend,
    wanted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the last hidden state (T, H) of a packed row.

    Args:
        llm: a causal LM's body.
        embeddings: (T, H).
        batch: the row.
        backend: of all layers' attention.
        wanted: (P,) int64, the tokens whose states are used; those of others are not finished, where that saves
            something, see `token_mlp`. None: all.

    Raises:
        ValueError: for a part of a row that cannot be computed by itself, see `check_part`.
    """
    if batch.part is not None:
        check_part(llm, batch.max_seqlen)
    segments = Segments(batch.cu_seqlens, batch.segment_lengths, batch.max_seqlen)
    return llm(
        inputs_embeds=embeddings[None],
        position_ids=batch.position_ids.unsqueeze(-2),  # (1, T), or (4, 1, T)
        wanted=wanted,
        **packed_arguments(backend, segments),
    ).last_hidden_state[0]


def packed_arguments(backend: AttentionBackend, segments: Segments) -> dict:
    """Returns the arguments a transformers model needs beside a packed row's embeddings and positions.

    They reach every layer's attention, also when layers are recomputed in the backward pass.

    The mask is a stand-in: transformers takes a 4-D mask as ready and builds none of its own, which would be
    dense, (T, T). `packed_attention` refuses it where the rest did not arrive. Without a cache: with one, which is
    transformers' default, even in training, a row's samples would not be told apart.
    """
    stand_in = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=segments.cu_seqlens.device)
    return {"attention_mask": stand_in, "attention_backend": backend, "segments": segments, "use_cache": False}


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    attention_backend: AttentionBackend | None = None,
    segments: Segments | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Returns causal attention (1, T, heads, head_dim) of a packed row by its backend; generation goes to SDPA.

    Args:
        module: the layer's attention.
        query: (1, heads, T, head_dim).
        key, value: (1, key-value heads, T, head_dim).
        attention_mask: of generation; a stand-in for packed rows.
        attention_backend, segments: of a packed row; None outside training.

    Raises:
        RuntimeError: if they did not reach this layer, which would let samples leak.
        ValueError: for a layer that asks for more than exact attention.
    """
    if segments is None or attention_backend is None:
        if attention_mask is not None and attention_mask.numel() == 1 and query.shape[2] > 1:
            raise RuntimeError(f"{type(module).__name__} was not given the segments of a packed row")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    check_supported(module, segments, dropout, kwargs)
    tokens = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attention_backend(*tokens, segments, scale=scaling, causal=True)[None], None


def check_supported(module: torch.nn.Module, segments: Segments, dropout: float, kwargs: dict) -> None:
    """Refuses a layer whose attention is not plain causal attention.

    Raises:
        ValueError: naming what it asks for, and what to set.
    """
    name = type(module).__name__
    if dropout > 0.0:
        raise ValueError(f"{name}: dropout {dropout} of attention weights; set llm.attention_dropout=0")
    if asked := [argument for argument in NOT_SUPPORTED if kwargs.get(argument) is not None]:
        raise ValueError(f"{name} asks for {', '.join(asked)}, which no packed attention has; choose another llm")
    window = kwargs.get("sliding_window")
    if window is not None and window < segments.max_length:
        raise ValueError(
            f"{name} attends within {window} tokens, and the row has a sample of {segments.max_length}; "
            f"set llm.use_sliding_window=false or shorten max_length"
        )


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
