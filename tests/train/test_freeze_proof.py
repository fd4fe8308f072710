"""What the first update of a stage proves; across ranks and under ZeRO see test_zero3.py."""

import pytest
import torch
from torch import nn

from eagle_train.train.engine import PlainEngine
from eagle_train.train.freeze_proof import CHUNK, FreezeError, FreezeProof, checksum
from eagle_train.train.optim import freeze
from eagle_train.train.schedule import Stage
from tests.toys import tiny_model, tiny_row, tiny_sample

RATES = {"mixture": None, "projector": 1e-2, "llm": 1e-2}


@pytest.fixture
def engine():
    model = tiny_model()
    model.llm.register_parameter("unused", nn.Parameter(torch.ones(3)))
    stage = Stage(recipe="x", learning_rates=RATES, max_length=256, rows_per_step=1, num_steps=1)
    freeze(model, RATES)
    return PlainEngine(model, stage, 1)


def step(engine, scale=1.0):
    row = tiny_row([tiny_sample(0, tiles=1)])
    engine.backward((engine.forward(row) * row.loss_weights).sum() * scale, last=True)
    engine.step(1.0)


def test_a_trained_parameter_without_gradient_is_named_with_the_way_out(engine):
    proof = FreezeProof(engine.model, engine.placement)
    step(engine)
    with pytest.raises(FreezeError, match=r"1 trained but without .*learning_rates.<name>=null.*: llm.unused\)"):
        proof.check()


def test_freezing_that_parameter_alone_is_the_way_out(engine):
    freeze(engine.model, RATES | {"llm.unused": None})
    proof = FreezeProof(engine.model, engine.placement)
    step(engine)
    proven = proof.check()
    assert proven.trained == sum(p.requires_grad for p in engine.model.parameters()) and proven.zero == ()
    assert proven.frozen == sum(not p.requires_grad for p in engine.model.parameters())


def test_a_gradient_that_is_not_finite_is_found(engine):
    freeze(engine.model, RATES | {"llm": None})
    proof = FreezeProof(engine.model, engine.placement)
    step(engine, scale=float("nan"))
    with pytest.raises(FreezeError, match=r"4 trained but with a gradient that is not finite.*: projector"):
        proof.check()


def test_one_of_several_rows_is_enough_for_a_bad_gradient_and_for_one_that_is_not_zero(engine):
    freeze(engine.model, RATES | {"llm": None})
    row = tiny_row([tiny_sample(0, tiles=1)])
    for scale in (0.0, float("nan")):
        proof = FreezeProof(engine.model, engine.placement)
        engine.backward((engine.forward(row) * row.loss_weights).sum() * scale, last=False)
        step(engine)
        if scale == 0.0:
            assert proof.check().zero == ()
    with pytest.raises(FreezeError, match=r"4 trained but with a gradient that is not finite"):
        proof.check()


def test_a_step_that_was_left_out_proves_nothing(engine):
    freeze(engine.model, RATES | {"llm": None})
    proof = FreezeProof(engine.model, engine.placement)
    row = tiny_row([tiny_sample(0, tiles=1)])
    engine.backward(engine.forward(row).sum() * float("nan"), last=True)
    engine.step(1.0, discard=True)
    proof.forget()
    step(engine)
    assert proof.check().trained == 4
    hooks = [parameter._backward_hooks for parameter in engine.model.parameters()]
    assert not any(hooks), "nothing watches any longer"


def test_zero_gradients_are_told_but_no_fault(engine):
    freeze(engine.model, RATES | {"llm": None})
    proof = FreezeProof(engine.model, engine.placement)
    step(engine, scale=0.0)
    assert "4 trained ones with finite gradients (4 of them zero: projector." in str(proof.check())


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, CHUNK + 5), (torch.bfloat16, 1001)])
def test_a_checksum_sees_the_last_bit_and_the_order(dtype, length):
    tensor = torch.randn(length, dtype=dtype)
    known = checksum(tensor)
    assert torch.equal(known, checksum(tensor.clone()))
    changed = tensor.clone()
    changed.view(torch.int32 if dtype == torch.float32 else torch.int16)[-1] ^= 1
    assert not torch.equal(known, checksum(changed))
    assert not torch.equal(known, checksum(tensor.roll(1)))
    assert not torch.equal(known, checksum(tensor.flip(0)))


def test_hooks_are_gone_after_the_proof(engine):
    freeze(engine.model, RATES | {"llm": None})
    proof = FreezeProof(engine.model, engine.placement)
    step(engine)
    proof.check()
    proof.seen.clear()
    step(engine)
    assert proof.seen == {}


def test_a_frozen_weight_that_moves_is_named(engine):
    freeze(engine.model, RATES | {"llm": None})
    proof = FreezeProof(engine.model, engine.placement)
    step(engine)
    moved = engine.model.llm.model.norm.weight.data
    moved[3] = torch.nextafter(moved[3], torch.tensor(9.0))
    with pytest.raises(FreezeError, match=r"1 frozen but changed .*: llm.model.norm.weight\)"):
        proof.check()
