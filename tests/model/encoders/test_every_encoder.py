"""What holds for every vision encoder, whatever its kind."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from eagle_train.model.encoders.base import aligned
from eagle_train.model.geometry import GeometryError
from tests.model.encoders.tiny import TINY, pixels, randomized, relative_error

kinds = pytest.mark.parametrize("kind", TINY)


@kinds
def test_declared_grid_and_channels_are_those_of_the_output(kind):
    encoder = TINY[kind]()
    features = encoder(pixels())
    assert features.shape == (2, encoder.channels, encoder.grid, encoder.grid) and encoder.grid > 1
    assert features.isfinite().all()


@kinds
@pytest.mark.parametrize("placeholder", [False, True], ids=["tile", "placeholder"])
def test_a_gradient_reaches_every_parameter(kind, placeholder):
    encoder = randomized(TINY[kind]()).train()
    features = encoder(pixels(), encoder.placeholder_size if placeholder else None)
    assert features.shape == (2, encoder.channels, *((1, 1) if placeholder else (encoder.grid, encoder.grid)))
    (features**2).sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@kinds
def test_only_rows_of_tokens_that_are_dropped_get_no_gradient(kind):
    encoder = randomized(TINY[kind]()).train()
    (encoder(pixels()) * torch.randn(1, encoder.channels, 1, 1)).sum().backward()
    unused = {"clip": {"vit.embeddings.class_embedding"}}.get(kind, set())
    assert {name for name, p in encoder.named_parameters() if not p.grad.any()} <= unused


@kinds
def test_a_black_tile_gives_finite_features(kind):
    encoder = randomized(TINY[kind]())
    assert encoder(torch.zeros_like(pixels())).isfinite().all()


@kinds
def test_recomputed_activations_change_no_gradient(kind):
    encoder = randomized(TINY[kind]()).train()
    calls = []
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *_: calls.append(1))

    def run():
        calls.clear()
        features = encoder(pixels())
        forward = len(calls)
        (features**2).sum().backward()
        gradients = [p.grad.clone() for p in encoder.parameters()]
        encoder.zero_grad()
        return features.detach(), gradients, len(calls) - forward

    kept, kept_gradients, extra = run()
    assert extra == 0
    encoder.set_activation_checkpointing()
    recomputed, gradients, extra = run()
    assert extra > 0
    assert torch.equal(kept, recomputed)
    for one, other in zip(kept_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other)


@kinds
def test_an_impossible_size_is_refused_with_the_nearest_possible_ones(kind):
    with pytest.raises(GeometryError) as error:
        TINY[kind](image_size=35)
    for size in error.value.nearest:
        assert TINY[kind](image_size=size).input_size == size


@kinds
def test_common_arguments_are_kept(kind):
    encoder = TINY[kind](resize=aligned, recompute=False, pretrained="somewhere")
    assert (encoder.resize, encoder.recompute, encoder.pretrained) == (aligned, False, "somewhere")


@kinds
def test_bfloat16_weights_give_nearly_the_same_features(kind):
    encoder = randomized(TINY[kind]())
    wanted = encoder(pixels())
    found = encoder.to(torch.bfloat16)(pixels())
    assert found.dtype == torch.bfloat16 and relative_error(found.float(), wanted) < 0.1


@kinds
def test_fan_in_init_lets_pictures_through(kind):
    torch.manual_seed(0)
    options = {"layer_scale": 1.0} if kind == "convnext" else {}
    features = TINY[kind](fan_in_init=True, **options)(pixels(8))
    between = features.std(dim=0).mean()  # of the same place in different pictures
    assert between > 0.1 * features.std()


@kinds
def test_construction_on_the_meta_device_holds_no_memory(kind):
    with torch.device("meta"):
        encoder = TINY[kind]()
        features = encoder(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    assert features.is_meta and all(tensor.is_meta for tensor in encoder.state_dict().values())


class Kernels(TorchFunctionMode):
    """Notes which functions of attention are called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.called.add(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


@kinds
def test_attention_is_torchs_fused_one(kind):
    """SAM's relative positions are its mask; only a convolutional encoder has none."""
    encoder = TINY[kind]()
    with Kernels() as kernels:
        encoder(pixels())
    assert "softmax" not in kernels.called
    assert ("scaled_dot_product_attention" in kernels.called) == (kind != "convnext")
