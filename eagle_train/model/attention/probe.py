"""Whether samples of a packed row stay apart: a small LLM of the run's family, tried before a stage begins."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_train.model.attention.backend import AttentionBackend
from eagle_train.model.attention.packed import PACKED, packed_hidden
from eagle_train.model.recompute import recompute_layers
from eagle_train.types import PackedBatch

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative difference (of Euclidean norms) between a sample in a row and alone, by dtype of the computation.

Rounding alone gives about a tenth of these; a sample that sees another differs by about one.
"""
LAYERS = 2
"""What leaks in the first layer has spread in the second."""


class LeakError(ValueError):
    """Samples of a packed row are not kept apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """Largest differences that the probe saw, relative."""

    outputs: float
    """Between hidden states of a sample in the row and alone."""
    gradients: float
    """Between the gradients of a sample's embeddings in the row and alone."""
    others: float
    """In hidden states and gradients of the other samples when one sample changes: 0 for an exact kernel."""


def probe_attention(
    llm: PreTrainedModel, backend: AttentionBackend, row: PackedBatch, *, autocast: bool = False
) -> ProbeResult:
    """Returns how far samples in a row are from what they are alone, forward and backward.

    A model of at most `LAYERS` layers is drawn from the family, head dimension and head sharing of `llm`, on its
    device and in its dtype, and recomputes its activations. Every sample is compared with itself alone, by torch's
    own causal attention without anything of packed rows; each in turn is changed, and no other may change; and the
    loss of all but the first may give the first no gradient. The global random state is left as it is.

    Args:
        llm: a causal LM's body.
        row: at least two samples, on the device.
        autocast: compute in bfloat16 over the weights' dtype.

    Raises:
        LeakError: naming the backend, the sample and the difference.
        ValueError: by the backend, where it cannot run.
    """
    check_positions(row)
    device, dtype = row.input_ids.device, next(llm.parameters()).dtype  # weights may wait in host memory
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        small = small_model(llm).to(device, dtype).train()
        recompute_layers(small)
        samples = [torch.randn(n, small.config.hidden_size).to(device, dtype) for n in row.segment_lengths]
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            found = compare(small, backend, row, samples)
    tolerance = TOLERANCE[torch.bfloat16 if autocast else dtype]
    # Comparisons with NaN are false, so that it is refused too.
    if not (found.outputs <= tolerance and found.gradients <= tolerance and found.others <= tolerance / 100):
        raise LeakError(
            f"attention {backend} does not keep the samples of a row apart: they differ from themselves alone by "
            f"{found.outputs:.2g} forward and {found.gradients:.2g} backward (up to {tolerance:g} is rounding), and "
            f"reach others by {found.others:.2g} (up to {tolerance / 100:g}); choose another `attention`, and report "
            f"this with the versions of torch and transformers"
        )
    return found


def check_positions(row: PackedBatch) -> None:
    """Refuses a row whose positions do not begin anew in every sample; rotary positions would hide it.

    Raises:
        LeakError: with the positions of the samples' first tokens.
    """
    starts = row.position_ids[..., row.cu_seqlens[:-1].long()]
    if starts.any():
        raise LeakError(f"positions of a row's samples begin at {starts.tolist()}, not at 0")


def compare(
    small: PreTrainedModel, backend: AttentionBackend, row: PackedBatch, samples: Sequence[torch.Tensor]
) -> ProbeResult:
    """Returns the differences of samples, whose embeddings are (T_i, H)."""
    leaves = [sample.clone().requires_grad_() for sample in samples]
    packed = run(small, backend, row, leaves)
    gradients = torch.autograd.grad(sum(map(loss_of, packed[1:])), leaves)
    others, outputs, gradient_differences = [], [], []
    for index, sample in enumerate(samples):
        leaf = sample.clone().requires_grad_()
        positions = torch.arange(len(sample), device=sample.device)
        single = small(inputs_embeds=leaf[None], position_ids=positions[None], use_cache=False).last_hidden_state[0]
        outputs.append(difference(packed[index], single))
        with torch.no_grad():
            changed = run(small, backend, row, [s.flip(0) if i == index else s for i, s in enumerate(samples)])
        others += [difference(changed[i], packed[i]) for i in range(len(samples)) if i != index]
        if index > 0:
            (expected,) = torch.autograd.grad(loss_of(single), leaf)
            gradient_differences.append(difference(gradients[index], expected))
            others.append(float(gradients[0].float().norm() / expected.float().norm()))
    # Not `max`: it would pass over NaN.
    outputs, gradient_differences, others = (max_or_nan(v) for v in (outputs, gradient_differences, others))
    return ProbeResult(outputs=outputs, gradients=gradient_differences, others=others)


def run(
    small: PreTrainedModel, backend: AttentionBackend, row: PackedBatch, samples: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Returns hidden states of a row by sample, (T_i, H), of their embeddings (T_i, H)."""
    return packed_hidden(small, torch.cat(list(samples)), row, backend).split(row.segment_lengths)


def loss_of(hidden: torch.Tensor) -> torch.Tensor:
    """Returns a weighted sum of hidden states (T_i, H)."""
    weights = torch.linspace(-1.0, 1.0, hidden.numel(), device=hidden.device).view_as(hidden)
    return (hidden.float() * weights).sum()


def max_or_nan(values: Sequence[float]) -> float:
    """Returns the largest of `values`, NaN if one is."""
    return float(torch.tensor(values).max())


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the norm of a difference over that of what is expected."""
    return float((found.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm())


def small_model(llm: PreTrainedModel) -> PreTrainedModel:
    """Returns a model of `llm`'s class and attention, with few heads and layers, random and of large weights."""
    config = llm.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sharing = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    key_heads = min(2, config.num_attention_heads // sharing)
    hidden_size = key_heads * sharing * head_dim
    layers = min(LAYERS, config.num_hidden_layers)
    values = config.to_dict() | {
        "num_hidden_layers": layers,
        "num_attention_heads": key_heads * sharing,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "vocab_size": 8,
        "pad_token_id": None,
    }
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    small = type(llm)(type(config).from_dict(values, attn_implementation=PACKED))
    for layer in small.modules():
        if isinstance(layer, nn.Linear):  # so that attention is far from uniform, and counts beside the residual
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return small
