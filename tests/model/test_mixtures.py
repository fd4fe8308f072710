"""Every fusion: shape, gradients, placeholder, micro-batches, what it starts from, and that it learns."""

import pytest
import torch

from eagle_train.model.encoders.clip_vit import ClipVit
from eagle_train.model.encoders.convnext import ConvNext
from eagle_train.model.mixtures.channel_concat import ChannelConcat
from eagle_train.model.mixtures.deformable_attention import DeformableAttention, DeformableSampling, centres, ring
from eagle_train.model.mixtures.mixture_adapter import MixtureAdapter, ResolutionAdapter
from eagle_train.model.mixtures.sequence_append import SequenceAppend

MIXTURES = {
    "concat": lambda encoders, **more: ChannelConcat(encoders=encoders, grid=4, **more),
    "folded": lambda encoders, **more: ChannelConcat(encoders=encoders, fold={"vit": 2, "fine": 3}, grid=2, **more),
    "append": lambda encoders, **more: SequenceAppend(encoders=encoders, **more),
    "adapter": lambda encoders, **more: MixtureAdapter(encoders=encoders, base="vit", stages=3, **more),
    "deformable": lambda encoders, **more: DeformableAttention(encoders=encoders, base="vit", heads=4, **more),
}
SHAPES = {
    "concat": (16, 48),
    "folded": (4, 16 * 4 + 24 + 8 * 9),
    "append": (16 + 9 + 36, 24),
    "adapter": (16, 16),
    "deformable": (16, 16),
}


@pytest.fixture(params=MIXTURES)
def kind(request):
    return request.param


def pixels(n=2, side=48, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def encoders(seed=0):
    """Returns three encoders of grids 4, 3 and 6 and widths 16, 24 and 8."""
    torch.manual_seed(seed)
    sizes = {"intermediate_size": 32, "num_attention_heads": 2, "fan_in_init": True}
    trunk = {"name": "convnext_atto", "depths": [1, 1, 1, 1], "dims": [8, 8, 24, 24], "layer_scale": 1.0}
    return {
        "vit": ClipVit(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=3, **sizes),
        "coarse": ConvNext(image_size=48, stage=2, fan_in_init=True, **trunk),
        "fine": ConvNext(image_size=48, stage=1, fan_in_init=True, **trunk),
    }


def mixture(kind, **more):
    torch.manual_seed(1)
    return MIXTURES[kind](encoders(), **more)


def shaken(module):
    """Returns the module with every parameter moved, so that nothing is zero by its initialization."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def test_shapes_are_the_declared_ones(kind):
    fused = mixture(kind)
    features = fused(pixels())
    assert features.shape == (2, fused.tokens_per_tile, fused.channels) == (2, *SHAPES[kind])


@pytest.mark.parametrize("layer_norm", [False, True])
def test_gradients_reach_every_parameter(kind, layer_norm):
    fused = shaken(mixture(kind, layer_norm=layer_norm))
    features = fused(pixels())
    features.square().sum().backward()
    for name, parameter in fused.named_parameters():
        dead = "class_embedding" in name or "k_proj.bias" in name  # zero by their place in the encoder
        assert parameter.grad is not None and (dead or parameter.grad.abs().max() > 0), name


def test_the_placeholder_is_small_and_reaches_every_parameter(kind):
    fused = mixture(kind, layer_norm=True)
    whole = []
    for encoder in fused.encoders.values():
        encoder.register_forward_hook(lambda module, inputs, out: whole.append(out.shape[-1]))
    features = fused.placeholder(pixels(1))
    assert features.shape == (1, 1, fused.channels)
    assert whole and set(whole) == {1}
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_micro_batches_change_nothing(kind):
    whole, pieces = shaken(mixture(kind)), shaken(mixture(kind, micro_batch=2))
    assert torch.allclose(whole(pixels(5)), pieces(pixels(5)), atol=1e-5)


def test_tiles_do_not_see_each_other(kind):
    fused = shaken(mixture(kind))
    tiles = pixels(3)
    before = fused(tiles)
    tiles[0] = 255 - tiles[0]
    after = fused(tiles)
    assert not torch.allclose(before[0], after[0])
    assert torch.allclose(before[1:], after[1:], atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "coarse", "fine"])
def test_every_encoder_has_a_say(kind, name):
    fused = shaken(mixture(kind))
    before = fused(pixels())
    shaken(fused.encoders[name])
    assert not torch.allclose(before, fused(pixels()), atol=1e-3)


def test_activation_checkpointing_changes_nothing(kind):
    gradients = []
    for saving in (False, True):
        fused = shaken(mixture(kind)).train()
        if saving:
            fused.set_activation_checkpointing(fused.encoders.values())
        fused(pixels()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in fused.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-5), name


def test_frozen_encoders_keep_no_graph_and_the_fusion_still_learns(kind):
    fused = shaken(mixture(kind, layer_norm=True))
    fused.encoders.requires_grad_(False)
    fused(pixels()).square().sum().backward()
    assert all(not encoder.training for encoder in fused.encoders.values())
    assert all(parameter.grad is None for parameter in fused.encoders.parameters())
    rest = {name: p for name, p in fused.named_parameters() if not name.startswith("encoders.")}
    assert rest and all(p.grad is not None and p.grad.abs().max() > 0 for p in rest.values())


def test_it_runs_in_bfloat16(kind):
    fused = mixture(kind).bfloat16()
    features = fused(pixels())
    assert features.dtype == torch.bfloat16 and features.isfinite().all()
    assert torch.allclose(features.float(), mixture(kind)(pixels()), atol=0.3)


def test_sequence_append_keeps_order_widens_and_resamples():
    parts = encoders()
    fused = SequenceAppend(encoders=parts, grids={"fine": 2})
    features = fused(pixels())
    assert features.shape == (2, 16 + 9 + 4, 24) and set(fused.widen) == {"vit", "fine"}
    coarse = parts["coarse"](pixels()).flatten(2).transpose(1, 2)
    assert torch.equal(features[:, 16:25], coarse)
    vit = fused.widen["vit"](parts["vit"](pixels()).flatten(2).transpose(1, 2))
    assert torch.equal(features[:, :16], vit)
    with pytest.raises(ValueError, match="grids names \\['finer'\\]"):
        SequenceAppend(encoders=parts, grids={"finer": 2})


def test_adapters_leave_the_base_as_it_was_at_first():
    parts = encoders()
    fused = MixtureAdapter(encoders=parts, base="vit", stages=3)
    maps = fused.encode(pixels())
    assert torch.allclose(maps["vit"], parts["vit"](pixels()), atol=1e-6)
    assert all(features.shape[2:] == (4, 4) for features in maps.values())
    shaken(fused.adapters)
    assert not torch.allclose(fused.encode(pixels())["vit"], parts["vit"](pixels()), atol=1e-3)


def test_an_adapter_is_its_formula():
    torch.manual_seed(0)
    adapter = shaken(ResolutionAdapter(4, {"a": 3}))
    x, h = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5)
    local = x + adapter.local[2](torch.nn.functional.gelu(adapter.local[0](x)))
    injected = adapter.inject["a"][2](torch.nn.functional.gelu(adapter.inject["a"][0](h)))
    means = torch.cat([local.mean((2, 3)), injected.mean((2, 3))], dim=1)
    hidden = torch.nn.functional.gelu(adapter.gates["a"][0](means))
    gate = torch.tanh(adapter.gates["a"][2](hidden)).view(2, 1, 1, 1)
    assert torch.allclose(adapter(x, {"a": h}), local + gate * injected, atol=1e-6)


def test_deformable_heads_look_around_in_a_ring_at_first():
    offsets = ring(heads=8, points=3)
    assert torch.allclose(offsets[0], torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]), atol=1e-6)
    assert torch.allclose(offsets[1, 1], torch.tensor([2.0, 2.0]), atol=1e-6)
    assert torch.allclose(offsets.abs().amax(dim=-1), torch.tensor([1.0, 2.0, 3.0]).expand(8, 3))
    sampling = DeformableSampling(16, heads=8, sources=2, points=3)
    assert torch.equal(sampling.offsets.bias.view(8, 2, 3, 2)[:, 1], offsets)


def test_deformable_attention_is_its_formula():
    torch.manual_seed(0)
    heads, points, channels = 2, 3, 8
    sampling = shaken(DeformableSampling(channels, heads=heads, sources=2, points=points))
    queries, maps = torch.randn(1, 4, channels), [torch.randn(1, channels, 3, 3), torch.randn(1, channels, 5, 5)]
    offsets = sampling.offsets(queries).view(4, heads, 2, points, 2)
    weights = sampling.logits(queries).view(4, heads, 2 * points).softmax(-1).view(4, heads, 2, points)
    wanted = torch.zeros(4, heads, channels // heads)
    for q, place in enumerate(centres(2, queries.device)):
        for h in range(heads):
            for s, value in enumerate(maps):
                for k in range(points):
                    x, y = (place * value.shape[-1] + offsets[q, h, s, k] - 0.5).tolist()
                    part = value[0, h * channels // heads : (h + 1) * channels // heads]
                    wanted[q, h] += weights[q, h, s, k] * bilinear(part, x, y)
    assert torch.allclose(sampling(queries, maps)[0], sampling.out(wanted.flatten(1)), atol=1e-5)


def bilinear(features, x, y):
    """Returns the value of (C, G, G) features at a place in cells (centres are whole numbers), 0 outside."""
    total = torch.zeros(len(features))
    for col in (int(x // 1), int(x // 1) + 1):
        for row in (int(y // 1), int(y // 1) + 1):
            if 0 <= row < features.shape[1] and 0 <= col < features.shape[2]:
                total += (1 - abs(x - col)) * (1 - abs(y - row)) * features[:, row, col]
    return total


@pytest.mark.slow
def test_every_fusion_learns_the_colour_of_each_quadrant(kind):
    fused = mixture(kind, layer_norm=True)
    head = torch.nn.Linear(fused.channels, 12)
    optimizer = torch.optim.AdamW([*fused.parameters(), *head.parameters()], lr=3e-3)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(60):
        colours = torch.randint(0, 256, (16, 3, 2, 2), generator=generator, dtype=torch.uint8)
        tiles = colours.repeat_interleave(24, dim=2).repeat_interleave(24, dim=3)
        answer = head(fused(tiles).mean(dim=1))
        loss = (answer - (colours.flatten(1).float() / 127.5 - 1.0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0], losses[::10]
