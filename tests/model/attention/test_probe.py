"""The probe lets exact attention pass and refuses every way in which samples can leak into each other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from eagle_train.data.collate import pack
from eagle_train.model.attention.backend import Segments
from eagle_train.model.attention.packed import packed_arguments, packed_hidden
from eagle_train.model.attention.probe import LeakError, probe_attention, small_model
from eagle_train.model.attention.segments import SegmentAttention
from eagle_train.model.attention.varlen import VarlenAttention
from eagle_train.model.llm import build_llm
from eagle_train.train.attention_check import check_attention, text_sample
from tests.model.attention.kernels import CPU, dense, varlen_2_15
from tests.toys import tiny_model

ROW = pack([text_sample(length) for length in (9, 14, 6)], [], filler_id=0, tile_size=1)
FAMILIES = {
    "llama": {"num_key_value_heads": 4},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
}


def body(model_type="llama", **fields):
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    return build_llm(model_type=model_type, num_hidden_layers=3, **(shape | FAMILIES[model_type] | fields)).model


def seen_through(changed):
    """A backend that takes other segments than it is given, and so lets samples leak."""

    def backend(query, key, value, segments, *, scale, causal):
        lengths = changed(list(segments.lengths))
        return SegmentAttention()(query, key, value, Segments.of(lengths, "cpu"), scale=scale, causal=causal)

    return backend


def with_mask(change):
    """A backend whose mask (T, T) is changed in place."""

    def backend(query, key, value, segments, *, scale, causal):
        length = len(query)
        sample = torch.bucketize(torch.arange(length), segments.cu_seqlens[1:].long(), right=True)
        mask = (sample[:, None] == sample) & torch.ones(length, length, dtype=torch.bool).tril()
        change(mask)
        tensors = (t.transpose(0, 1)[None] for t in (query, key, value))
        found = F.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=scale, enable_gqa=True)
        return found[0].transpose(0, 1)

    return backend


def not_causal(query, key, value, segments, *, scale, causal):
    return SegmentAttention()(query, key, value, segments, scale=scale, causal=False)


def one_product(row, column):
    def change(mask):
        mask[row, column] = True

    return change


class LeaksBackward(torch.autograd.Function):
    """Passes tokens on, and their gradients to the tokens before them."""

    @staticmethod
    def forward(ctx, tokens):
        return tokens.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.roll(-1, 0)


def leaks_backward(query, key, value, segments, **arguments):
    return SegmentAttention()(query, key, LeaksBackward.apply(value), segments, **arguments)


LEAKS = {
    "no mask": seen_through(lambda lengths: [sum(lengths)]),
    "the first two are one": seen_through(lambda lengths: [lengths[0] + lengths[1], *lengths[2:]]),
    "the last two are one": seen_through(lambda lengths: [*lengths[:-2], lengths[-2] + lengths[-1]]),
    "a border is one token late": seen_through(lambda lengths: [lengths[0] + 1, lengths[1] - 1, *lengths[2:]]),
    "a border is one token early": seen_through(lambda lengths: [*lengths[:-2], lengths[-2] - 1, lengths[-1] + 1]),
    "one token of the last sees one of the first": with_mask(one_product(-1, 2)),
    "one token of the first sees one of the last": with_mask(one_product(2, -1)),
    "not causal": not_causal,
    "another scale": lambda q, *rest, scale, **kwargs: SegmentAttention()(q, *rest, scale=2 * scale, **kwargs),
    "only backward": leaks_backward,
    "not a number": lambda query, *_, **__: query * float("nan"),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_attention_passes(family, dtype, autocast):
    for backend in (SegmentAttention(), VarlenAttention(varlen_2_15, CPU)):
        found = probe_attention(body(family).to(dtype), backend, ROW, autocast=autocast)
        limit = 1e-5 if dtype == torch.float32 and not autocast else 3e-2
        assert max(found.outputs, found.gradients) < limit
        assert found.others == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_refused(leak, dtype):
    with pytest.raises(LeakError, match="does not keep the samples of a row apart"):
        probe_attention(body().to(dtype), LEAKS[leak], ROW)


def test_a_leak_names_the_backend_and_the_difference():
    class Named:
        def __str__(self):
            return "leaky"

        def __call__(self, *args, **kwargs):
            return LEAKS["no mask"](*args, **kwargs)

    with pytest.raises(LeakError, match=r"attention leaky .* by \d\.?\d* forward .* reach others by \d\.?\d*"):
        probe_attention(body(), Named(), ROW)


def test_positions_that_go_on_over_samples_are_refused():
    """Rotary positions would hide it: shifted by as much, they give the same attention."""
    going_on = replace(ROW, position_ids=torch.arange(len(ROW.position_ids)))
    with pytest.raises(LeakError, match=r"begin at \[0, 9, 23\], not at 0"):
        probe_attention(body(), SegmentAttention(), going_on)


def test_a_model_that_does_not_hand_arguments_down_is_refused():
    class Forgetful(type(body())):
        """Its layers get neither backend nor segments."""

        def forward(self, *args, attention_backend, segments, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(RuntimeError, match="was not given the segments of a packed row"):
        probe_attention(Forgetful(body().config), SegmentAttention(), ROW)


def test_a_model_with_another_attention_is_refused():
    class Other(type(body())):
        """Takes torch's attention, whatever it is told."""

        def __init__(self, config):
            config._attn_implementation = "sdpa"
            super().__init__(config)

    with pytest.raises(LeakError):
        probe_attention(Other(body().config), SegmentAttention(), ROW)


def test_without_a_mask_and_with_a_cache_transformers_lets_samples_leak():
    """What the arguments are for, in transformers' own packing by positions."""
    small = small_model(body()).eval()
    small.set_attn_implementation("sdpa")
    embeddings = torch.randn(1, len(ROW.input_ids), small.config.hidden_size)
    with torch.no_grad():
        expected = packed_hidden(small_like(small), embeddings[0], ROW, SegmentAttention())
        for cached in (True, False):
            found = small(inputs_embeds=embeddings, position_ids=ROW.position_ids[None], use_cache=cached)
            leaked = float((found.last_hidden_state[0] - expected).abs().max()) > 0.1
            assert leaked == cached
    assert packed_arguments(SegmentAttention(), Segments.of((2,), "cpu"))["use_cache"] is False


def small_like(model):
    twin = small_model(model).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def test_the_random_state_of_a_run_is_left_alone():
    llm, state = body(), torch.get_rng_state()
    probe_attention(llm, SegmentAttention(), ROW)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stage_says_what_attention_it_has_and_stops_before_one_that_leaks(capsys):
    model, engine = tiny_model(), SimpleNamespace(device=torch.device("cpu"), bf16=False)
    check_attention(model, engine)
    assert "attention: segments; a sample in a row is itself alone" in capsys.readouterr().err
    model.attention = LEAKS["no mask"]
    with pytest.raises(LeakError):
        check_attention(model, engine)


def test_the_small_model_keeps_what_kernels_depend_on():
    shape = {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 24, "hidden_size": 64}
    small = small_model(body("qwen3", **shape)).config
    assert (small.head_dim, small.num_attention_heads, small.num_key_value_heads) == (24, 8, 2)
    assert small.num_hidden_layers == 2


def test_dense_attention_is_an_oracle_of_its_own():
    tokens = torch.randn(5, 2, 8)
    whole = dense(tokens, tokens, tokens, torch.tensor([0, 2, 5], dtype=torch.int32), scale=0.3, causal=True)
    assert torch.equal(whole[0], tokens[0]) and torch.equal(whole[2], tokens[2])
