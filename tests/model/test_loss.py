"""Losses in chunks are the losses of whole logits, gradients too, and hold no more than a chunk of them."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eagle_train.model.loss import ChunkedCrossEntropy, LigerCrossEntropy, LossHead, ligers_loss, target_places
from eagle_train.types import IGNORE_INDEX

TOKENS, HIDDEN, VOCABULARY = 40, 16, 50


def problem(dtype=torch.float32, bias=True, tokens=TOKENS):
    """Returns hidden states, labels a third of which are ignored, a head, and what every token's loss counts."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    labels[::3] = IGNORE_INDEX
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    counts = torch.rand(tokens, generator=generator) + 0.5
    return hidden, labels, head.to(dtype), counts


def gradients(losses, counts, *tensors):
    return torch.autograd.grad((losses * counts).sum(), tensors)


def plain(hidden, labels, head):
    return F.cross_entropy(head(hidden).float(), labels, reduction="none", ignore_index=IGNORE_INDEX)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
def test_losses_and_gradients_are_those_of_whole_logits(chunk, bias):
    hidden, labels, head, counts = problem(bias=bias)
    wanted = plain(hidden, labels, head)
    wanted_gradients = gradients(wanted, counts, hidden, *head.parameters())
    ours = LossHead(head, ChunkedCrossEntropy(chunk))
    losses = ours(hidden, labels)
    assert losses.dtype == torch.float32 and (losses[::3] == 0).all() and (losses[1::3] > 0).all()
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-6)
    for found, right in zip(gradients(losses, counts, hidden, *head.parameters()), wanted_gradients, strict=True):
        # Summed in another order: what rounding leaves is of the largest terms, not of their sum.
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6 * max(1.0, right.abs().max().item()))


def test_labels_that_were_counted_need_no_counting():
    hidden, labels, head, _ = problem()
    ours = LossHead(head, ChunkedCrossEntropy(7))
    places = target_places(labels, int((labels >= 0).sum()))
    assert torch.equal(places, target_places(labels)) and (labels[places] >= 0).all()
    assert torch.equal(ours(hidden, labels, places), ours(hidden, labels))


@pytest.mark.slow
def test_in_bfloat16_the_weights_gradient_is_summed_in_float32():
    """Summed in bfloat16 over 1000 chunks, it would stand still when a chunk is below 1/256 of the sum."""
    hidden, labels, head, counts = problem(torch.bfloat16, bias=False, tokens=3000)
    exact = [t.detach().double().requires_grad_() for t in (hidden, head.weight)]
    logits = exact[0] @ exact[1].T
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
    right = gradients(losses, counts.double(), exact[1])[0]
    ours = LossHead(head, ChunkedCrossEntropy(2))
    found = gradients(ours(hidden, labels), counts, head.weight)[0]
    summed = torch.zeros_like(head.weight)
    for some in range(0, len(labels), 2):
        piece = slice(some, some + 2)
        summed += gradients(ours(hidden[piece], labels[piece]), counts[piece], head.weight)[0]
    error, naive = ((t.double() - right).norm() / right.norm() for t in (found, summed))
    assert found.dtype == torch.bfloat16 and error < 0.01 < naive


def test_autocast_multiplies_in_bfloat16_over_float32_weights():
    hidden, labels, head, counts = problem()
    ours = LossHead(head, ChunkedCrossEntropy(7))
    exact = ours(hidden, labels)
    with torch.autocast("cpu", torch.bfloat16):
        losses = ours(hidden, labels)
        wanted = plain(hidden, labels, head)
    assert losses.dtype == torch.float32 and not torch.equal(losses, exact)
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-6)
    found, right = gradients(losses, counts, hidden, head.weight), gradients(wanted, counts, hidden, head.weight)
    for one, other in zip(found, right, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)


def test_a_frozen_head_gives_its_input_a_gradient_and_gets_none():
    hidden, labels, head, counts = problem()
    wanted = gradients(plain(hidden, labels, head), counts, hidden)[0]
    head.requires_grad_(False)
    (LossHead(head, ChunkedCrossEntropy(7))(hidden, labels) * counts).sum().backward()
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-5, atol=1e-6)
    assert head.weight.grad is None and head.bias.grad is None


def test_a_row_without_labels_gives_the_head_a_gradient_of_zero():
    hidden, labels, head, _ = problem()
    losses = LossHead(head, ChunkedCrossEntropy(7))(hidden, torch.full_like(labels, IGNORE_INDEX))
    losses.sum().backward()
    assert (losses == 0).all() and (head.weight.grad == 0).all() and (hidden.grad == 0).all()


def test_no_chunk_of_nothing():
    with pytest.raises(ValueError, match="at least 1 position at a time, not 0"):
        ChunkedCrossEntropy(0)


def test_liger_says_what_it_needs():
    hidden, labels, head, _ = problem()
    with pytest.raises(ValueError, match=r"need a GPU, the model is on cpu; use loss=chunked"):
        LossHead(head, LigerCrossEntropy())(hidden, labels)


@pytest.mark.parametrize(("release", "good"), [("0.8.4", False), ("0.8.5", True), ("0.10.0.dev1", True)])
def test_a_release_of_liger_whose_gradients_are_wrong_is_refused(monkeypatch, release, good):
    installed = ModuleType("liger_kernel.transformers")
    installed.LigerFusedLinearCrossEntropyLoss = LossHead
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", installed)
    monkeypatch.setattr("eagle_train.model.loss.version", lambda name: {"liger-kernel": release}[name])
    if good:
        assert ligers_loss() is LossHead
    else:
        with pytest.raises(ValueError, match=r"liger-kernel 0\.8\.4 has wrong gradients.*loss=chunked"):
            ligers_loss()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a GPU")
@pytest.mark.parametrize("bias", [True, False])
def test_liger_gives_the_same_losses_and_gradients(bias):
    pytest.importorskip("liger_kernel")
    hidden, labels, head, counts = problem(bias=bias)
    hidden = hidden.detach().cuda().requires_grad_()
    labels, head, counts = labels.cuda(), head.cuda(), counts.cuda()
    wanted = plain(hidden, labels, head)
    losses = LossHead(head, LigerCrossEntropy())(hidden, labels)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    right = gradients(wanted, counts, hidden, *head.parameters())
    for one, other in zip(gradients(losses, counts, hidden, *head.parameters()), right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
