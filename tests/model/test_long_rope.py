"""LongRoPE and dynamic NTK scaling in packed rows: each sample is turned as transformers turns it alone."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Phi3ForCausalLM

from eagle_train.model.attention.backend import Segments
from eagle_train.model.attention.packed import PACKED, packed_arguments, packed_hidden
from eagle_train.model.attention.segments import SegmentAttention
from eagle_train.model.long_rope import SampleDynamicRope, SampleLongRope, lengths
from eagle_train.train.sequence.spread import check_group
from eagle_train.types import RowPart
from tests.toys import gradients, tiny_model, tiny_row, tiny_sample

ORIGINAL = 32
"""Tokens of the tiny model's original context."""
PHI3 = {
    "model_type": "phi3",
    "num_key_value_heads": 4,
    "pad_token_id": None,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": ORIGINAL,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.05, 1.1, 1.2],
        "long_factor": [1.1, 2.0, 5.0, 9.0],
    },
}
DYNAMIC = {
    "max_position_embeddings": ORIGINAL,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
}
# At the border, beyond it, within it; the row is longer than the original context whatever its samples are.
SAMPLES = [
    tiny_sample(1, tiles=0, text=ORIGINAL),
    tiny_sample(2, tiles=2, text=ORIGINAL),
    tiny_sample(3, tiles=1, text=9),
    tiny_sample(4, tiles=0, text=ORIGINAL + 1),
]


def theirs(llm):
    """transformers' own class with the weights of ours."""
    kind = {"phi3": Phi3ForCausalLM, "llama": LlamaForCausalLM}[llm.config.model_type]
    own = kind._from_config(deepcopy(llm.config), attn_implementation="eager")
    own.load_state_dict(dict(llm.state_dict()))
    return own.eval()


def separate_losses(model, llm):
    """Losses of the samples, weighted, by transformers' own forward pass, one call each."""
    found = []
    rotary = llm.model.rotary_emb
    for sample in SAMPLES:
        llm.model.rotary_emb = deepcopy(rotary)  # it remembers the longest sample
        row = tiny_row([sample])
        embeddings = model.embed(row.input_ids, row.image_positions, row.pixels)
        logits = llm(inputs_embeds=embeddings[None], use_cache=False).logits[0]
        found.append(F.cross_entropy(logits, sample.labels, reduction="none") * sample.loss_weights)
    return found


@pytest.mark.parametrize("kind", [PHI3, DYNAMIC], ids=["longrope", "dynamic"])
def test_samples_of_a_row_have_the_losses_and_gradients_that_transformers_gives_them_alone(kind):
    model = tiny_model(**kind)
    llm = theirs(model.llm)
    row = tiny_row(SAMPLES)
    packed = (model(row) * row.loss_weights).split(list(row.segment_lengths))
    total = row.loss_weights.sum()
    (sum(loss.sum() for loss in packed) / total).backward()
    ours = gradients(model)
    alone = separate_losses(model, llm)
    (sum(loss.sum() for loss in alone) / total).backward()
    expected = gradients(model) | {f"llm.{name}": p.grad for name, p in llm.named_parameters() if p.grad is not None}
    for found, wanted in zip(packed, alone, strict=True):
        assert wanted.max() > 0.1
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5, msg=name)


@torch.no_grad()
def test_transformers_own_embedding_turns_short_samples_by_the_longest_of_the_row():
    """Why there is one of ours; once it tells samples apart, this fails and ours can go."""
    model = tiny_model(**PHI3)
    llm = theirs(model.llm)
    row = tiny_row(SAMPLES)
    embeddings = model.embed(row.input_ids, row.image_positions, row.pixels)
    segments = Segments(row.cu_seqlens, row.segment_lengths, row.max_seqlen)
    arguments = packed_arguments(SegmentAttention(), segments)
    llm.set_attn_implementation(PACKED)
    found = []
    for body in (model.llm.model, llm.model):
        hidden = body(inputs_embeds=embeddings[None], position_ids=row.position_ids[None], **arguments)
        found.append(hidden.last_hidden_state[0].split(list(row.segment_lengths)))
    apart = [float((ours - own).abs().max()) for ours, own in zip(*found, strict=True)]
    assert apart[0] > 1e-2 and apart[2] > 1e-3 and max(apart[1], apart[3]) < 1e-5


@torch.no_grad()
def test_within_the_context_dynamic_scaling_turns_by_the_bits_of_transformers():
    llm = tiny_model(**DYNAMIC).llm
    assert isinstance(llm.model.rotary_emb, SampleDynamicRope)
    positions = torch.arange(ORIGINAL)[None]
    ours, own = (one.model.rotary_emb(torch.ones(1), positions) for one in (llm, theirs(llm)))
    assert all(torch.equal(a, b) for a, b in zip(ours, own, strict=True))


def test_ranks_share_rows_of_dynamic_scaling_within_the_context_alone():
    model = tiny_model(**DYNAMIC)
    check_group(model, 2)
    for text in (ORIGINAL, ORIGINAL + 1):
        row = tiny_row([tiny_sample(1, tiles=0, text=text)])
        part = replace(row, part=RowPart(index=0, begin=0, made=(0, 0, 0), placed=(0, 0, 0)))
        if text == ORIGINAL:
            packed_hidden(model.llm.model, torch.zeros(text, 32), part, SegmentAttention())
            continue
        with pytest.raises(ValueError, match=r"33 tokens .* context of 32; set engine.sequence_parallel=1"):
            packed_hidden(model.llm.model, torch.zeros(text, 32), part, SegmentAttention())


def test_lengths_are_those_of_the_samples():
    assert lengths(torch.tensor([[0, 1, 2, 0, 1, 0]])).tolist() == [[3, 3, 3, 2, 2, 1]]
    # Padded on the left, then one new token each.
    assert lengths(torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])).tolist() == [[1, 1, 2, 2], [4, 4, 4, 4]]
    assert lengths(torch.tensor([[7], [2]])).tolist() == [[8], [3]]


def test_other_rotary_embeddings_are_transformers_own():
    default = PHI3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    for changes in (default, {}):
        assert not isinstance(tiny_model(**changes).llm.model.rotary_emb, SampleLongRope)


@torch.no_grad()
def test_generation_goes_on_from_a_cache_by_the_factors_of_its_length():
    llm = tiny_model(**PHI3).llm.eval()
    for length in (ORIGINAL - 8, ORIGINAL + 5):
        ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(length))
        said = llm.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        logits = theirs(llm)(said, use_cache=False).logits[0]
        assert said[0, length:].tolist() == logits[length - 1 : -1].argmax(-1).tolist()


def test_ranks_do_not_share_its_rows():
    model = tiny_model(**PHI3)
    check_group(model, 1)
    with pytest.raises(ValueError, match=r"phi3 with LongRoPE cannot be shared by 2 ranks.*sequence_parallel=1"):
        check_group(model, 2)
