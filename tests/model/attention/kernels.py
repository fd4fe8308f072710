"""Kernels for packed rows on a CPU, of the signatures of those that need a GPU; they check what those would."""

from __future__ import annotations

import torch

from eagle_train.model.attention.limits import KernelLimits

CPU = KernelLimits(device_type="cpu", dtypes=(torch.float32, torch.bfloat16))


def dense(query, key, value, cu_seqlens, *, scale, causal):
    """Returns attention by one (T, T) matrix: every product is made, and those of other samples left out."""
    length, heads = query.shape[:2]
    sample = torch.bucketize(torch.arange(length), cu_seqlens[1:].long(), right=True)
    seen = sample[:, None] == sample
    if causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(value.dtype)


def varlen_2_15(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.15."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return varlen_2_11(
        query,
        *(t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value)),
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_size=window_size,
    )


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.11, which does not check the number of heads."""
    assert query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32  # one tensor, or cuDNN is not taken
    assert max_q == max_k == int(cu_seq_q.diff().max()) and type(max_q) is int
    assert window_size in ((-1, 0), (-1, -1)) and type(window_size) is tuple  # torch compares it as a tuple
    return dense(query, key, value, cu_seq_q, scale=scale, causal=window_size == (-1, 0))


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """`flash_attn.flash_attn_varlen_func`."""
    assert q.dtype == k.dtype == v.dtype and q.shape[1] % k.shape[1] == 0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    return dense(q, k, v, cu_seqlens_q, scale=softmax_scale, causal=causal)


def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """`flash_attn_interface.flash_attn_varlen_func` of its early releases."""
    found = flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    return found, torch.zeros(q.shape[1], len(q))
