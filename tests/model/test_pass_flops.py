"""FLOPs of rows are those that torch's counter sees in the real forward and backward pass."""

from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eagle_train.model.flop_counter import FlopCounter
from eagle_train.model.loss import LigerCrossEntropy
from eagle_train.model.pass_flops import row_counts, step_flops
from eagle_train.model.prealign import PreAlignment
from eagle_train.model.projector import MlpProjector
from eagle_train.train.optim import freeze
from tests.toys import TILE, VOCAB, tiny_model, tiny_row, tiny_sample

FROZEN = {
    "nothing": {"mixture": 1.0, "projector": 1.0, "llm": 1.0},
    "all but the projector": {"mixture": None, "projector": 1.0, "llm": None},
    "encoders": {"mixture": None, "projector": 1.0, "llm": 1.0},
    "one encoder and the LLM": {"mixture": 1.0, "mixture.encoders.vit": None, "projector": 1.0, "llm": None},
    "all but the last layer": {"mixture": None, "projector": None, "llm": None, "llm.model.layers.1": 1.0},
    "all but the head": {"mixture": None, "projector": None, "llm": None, "llm.lm_head": 1.0},
}
ROWS = {  # (tiles, tokens of text) of each sample
    "images and text": [(2, 12), (0, 30), (1, 9)],
    "one image": [(1, 40)],
    "text alone": [(0, 40), (0, 7)],
}


def product_flops(sum_shape, left_shape, right_shape, out_shape=None, **kwargs):
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]


def convolution_backward_flops(out_gradient, images, weight, *arguments, out_shape=None, **kwargs):
    return sum(2 * out_gradient.numel() // out_gradient[1] * weight.numel() for made in out_shape[:2] if made)


ADDED = {
    torch.ops.aten.addmm_: product_flops,
    torch.ops.aten.convolution_backward: convolution_backward_flops,
}
"""What torch's counter leaves out, the sum of the head's gradient over chunks, and what it has wrong, groups."""


def row_of(shapes):
    return tiny_row([tiny_sample(i, tiles=tiles, text=text) for i, (tiles, text) in enumerate(shapes)])


def meta(rates):
    with torch.device("meta"):
        model = tiny_model()
    freeze(model, rates)
    return model


@cache
def counted(frozen, recomputed):
    """Returns the FLOPs of a step of the tiny model; they are plain numbers."""
    return step_flops(meta(FROZEN[frozen]), TILE, recomputed=recomputed)


def seen_by_torch(model, row):
    with FlopCounterMode(display=False, custom_mapping=ADDED) as counter:
        model(row).sum().backward()
    return counter.get_total_flops()


def executed_in_full_squares(flops, row):
    """Torch's counter takes causal attention for full squares."""
    return flops.of(row)[1] + flops.executed.per_square * row_counts(row).squares


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frozen", "recomputed"),
    [*((name, False) for name in FROZEN), *((name, True) for name in ("nothing", "encoders", "all but the head"))],
)
def test_executed_flops_are_those_of_the_real_pass(frozen, recomputed):
    flops = counted(frozen, recomputed)
    model = tiny_model().train()
    freeze(model, FROZEN[frozen])
    if recomputed:
        model.set_activation_checkpointing()
    for name, shapes in ROWS.items():
        row = row_of(shapes)
        assert executed_in_full_squares(flops, row) == seen_by_torch(model, row), name


@pytest.mark.slow
def test_useful_flops_hold_every_product_once():
    """What the real pass computes again: logits of the loss, a fifth of attention's backward pass, placeholders."""
    flops = counted("nothing", True)
    model, row = tiny_model().train(), row_of(ROWS["images and text"])
    with FlopCounterMode(display=False, custom_mapping=ADDED) as counter:
        model(row).sum().backward()
    by_operation = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    scores = next(count for name, count in by_operation.items() if "attention" in name and "backward" in name) // 5
    counts = row_counts(row)
    logits = 2 * VOCAB * model.llm.config.hidden_size * counts.targets
    once = sum(by_operation.values()) - scores - logits
    assert flops.of(row)[0] + flops.useful.per_square * counts.squares == once
    assert flops.useful.placeholder == 0 < flops.executed.placeholder


def test_attention_is_half_of_the_squared_lengths_of_samples():
    flops = counted("nothing", False).useful
    config = tiny_model().llm.config
    # Scores and their product with the values, 2 FLOPs per multiply-add, twice of that backward, halved.
    assert flops.per_square == 2 * 2 * config.hidden_size * config.num_hidden_layers * 3 / 2
    assert row_counts(row_of([(0, 30), (0, 10)])).squares == 30**2 + 10**2


@pytest.mark.slow
def test_recomputing_and_freezing_change_what_they_should():
    full, again = (counted("nothing", flag) for flag in (False, True))
    assert again.useful == full.useful and again.executed.per_token > full.executed.per_token
    projector = counted("all but the projector", False).useful
    # Gradients pass through the LLM: twice the forward pass instead of three times.
    assert projector.per_token == pytest.approx(full.useful.per_token * 2 / 3, rel=0.01)
    assert projector.per_square == full.useful.per_square
    assert projector.per_tile < full.useful.per_tile / 2


def test_a_stage_that_aligns_one_encoder_counts_that_one():
    def aligned():
        return PreAlignment(tiny_model(), "vit", MlpProjector)

    rates = {"mixture": None, "mixture.encoders.vit": 1.0, "projector": None, "llm": None, "aligner": 1.0}
    with torch.device("meta"):
        shapes = aligned()
    freeze(shapes, rates)
    flops = step_flops(shapes, TILE, recomputed=False)
    model = aligned().train()
    freeze(model, rates)
    for shapes in ROWS.values():
        row = row_of(shapes)
        assert executed_in_full_squares(flops, row) == seen_by_torch(model, row)


@pytest.mark.slow
def test_the_model_is_left_as_it_is_and_ligers_loss_needs_no_gpu_to_be_counted():
    model = meta(FROZEN["nothing"])
    plain = counted("nothing", True)
    losses = LigerCrossEntropy()
    head = model.llm.get_output_embeddings()
    head.token_losses = losses
    flops = step_flops(model, TILE, recomputed=True)
    assert head.token_losses is losses and not model.mixture.checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())
    assert flops == plain and flops.executed.per_target > flops.useful.per_target


@pytest.mark.slow
def test_an_empty_row_costs_no_useful_flops():
    flops = counted("nothing", False)
    useful, executed = flops.of(tiny_row([]))
    assert useful < 1e-2 * executed


def test_the_counter_sees_what_torchs_counter_sees():
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.GELU(),
        torch.nn.LayerNorm(6),
        torch.nn.Linear(6, 5),
    ).to("meta")
    module[3].requires_grad_(False)  # its backward makes one of three gradients
    pixels = torch.zeros(2, 3, 8, 8, device="meta")
    seen = {}
    for counter in (FlopCounter(seen), FlopCounter(seen)):  # the second finds all operations known
        with counter:
            module(pixels).sum().backward()
        with FlopCounterMode(display=False) as torchs:
            module(pixels).sum().backward()
        assert counter.total() == torchs.get_total_flops() > 0


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_convolution_in_groups_is_counted_as_one_convolution_per_group(kind, groups):
    def flops(channels, made, groups, counter):
        module = kind(channels, made, 3, stride=2, groups=groups, device="meta")
        images = torch.zeros(2, channels, 9, 9, device="meta", requires_grad=True)
        with counter:
            module(images).sum().backward()
        return counter

    ours = flops(6, 12, groups, FlopCounter({})).total()
    torchs = flops(6 // groups, 12 // groups, 1, FlopCounterMode(display=False)).get_total_flops()
    assert ours == groups * torchs > 0
