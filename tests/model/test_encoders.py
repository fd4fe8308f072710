"""Encoders and mixture: declared sizes are true, statistics applied, order kept."""

from functools import partial

import pytest
import torch

from eagle_train.model.encoders.base import aligned, antialiased, init_from_fan_in
from eagle_train.model.encoders.clip_vit import ClipVit
from eagle_train.model.encoders.convnext import ConvNext
from eagle_train.model.generate import Prompt, generate
from eagle_train.model.mixtures.base import to_grid
from eagle_train.model.mixtures.channel_concat import ChannelConcat
from tests.toys import TILE, TOKENS_PER_TILE, tiny_model, tiny_row, tiny_sample


def pixels(n=2, side=48, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def encoders():
    vit = ClipVit(
        image_size=32, patch_size=8, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return {
        "vit": vit,
        "convnext": ConvNext(name="convnext_atto", image_size=48, depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], stage=2),
    }


def test_declared_grid_and_channels_are_those_of_the_output():
    for name, encoder in encoders().items():
        assert encoder(pixels()).shape == (2, encoder.channels, encoder.grid, encoder.grid), name


def test_mixture_concatenates_channels_in_order_on_one_grid():
    torch.manual_seed(0)
    parts = encoders()
    mixture = ChannelConcat(encoders=parts, grid=5)
    features = mixture(pixels())
    assert features.shape == (2, 25, 24 + 24) and mixture.channels == 48 and mixture.tokens_per_tile == 25
    first = to_grid(parts["vit"](pixels()), 5, aligned).flatten(2).transpose(1, 2)
    assert torch.allclose(features[..., :24], first)


def test_micro_batches_change_nothing():
    torch.manual_seed(0)
    parts = encoders()
    whole, pieces = ChannelConcat(encoders=parts, grid=4), ChannelConcat(encoders=parts, grid=4, micro_batch=2)
    assert torch.allclose(whole(pixels(5)), pieces(pixels(5)), atol=1e-5)


def test_the_placeholder_is_small_and_reaches_every_parameter():
    parts = encoders()
    mixture = ChannelConcat(encoders=parts, grid=4, layer_norm=True)
    sizes = []
    for encoder in parts.values():
        encoder.register_forward_hook(lambda m, inputs, out: sizes.append(out.shape[-1]))
    features = mixture.placeholder(pixels(1))
    assert features.shape == (1, 1, mixture.channels) and sizes == [1, 1]
    features.sum().backward()
    assert all(p.grad is not None for name, p in mixture.named_parameters())


def test_tokens_are_row_major():
    features = torch.arange(6.0).view(1, 1, 2, 3)[..., :2]
    tokens = to_grid(features, 2, aligned).flatten(2)
    assert tokens.tolist() == [[[0.0, 1.0, 3.0, 4.0]]]


def test_an_encoder_normalizes_with_its_own_statistics():
    seen = []
    vit = encoders()["vit"]
    vit.encode = lambda images: seen.append(images) or images
    grey = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    vit(grey)
    wanted = (1.0 - torch.tensor(vit.mean)) / torch.tensor(vit.std)
    assert torch.allclose(seen[0][0, :, 5, 5], wanted)


def test_aligned_resizing_keeps_the_corners():
    # with aligned corners, 2 -> 3 puts the middle between the corners; without, it would pull the corners inwards
    small = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[None, None]
    assert aligned(small, 3)[0, 0].tolist() == [[0.0, 0.5, 1.0], [1.0, 1.5, 2.0], [2.0, 2.5, 3.0]]


def test_a_mixture_in_parity_is_the_written_out_pre_processing():
    torch.manual_seed(0)
    vit = encoders()["vit"]
    vit.resize = aligned
    mixture, tiles = ChannelConcat(encoders={"vit": vit}, grid=5), pixels()
    normalized = (tiles.float() / 255 - torch.tensor(vit.mean).view(3, 1, 1)) / torch.tensor(vit.std).view(3, 1, 1)
    interpolate = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=True)
    by_hand = interpolate(vit.encode(interpolate(normalized, size=(32, 32))), size=(5, 5)).flatten(2).transpose(1, 2)
    assert torch.allclose(mixture(tiles), by_hand, atol=1e-5)


@pytest.mark.parametrize("resize", [antialiased, aligned])
def test_resize_keeps_a_constant_image_constant(resize):
    grey = torch.full((1, 3, 50, 50), 0.2)
    assert torch.allclose(resize(grey, 17), torch.full((1, 3, 17, 17), 0.2), atol=1e-6)


def test_batched_generation_equals_one_by_one():
    model = tiny_model().eval()
    samples = [tiny_sample(1, tiles=1), tiny_sample(2, tiles=0, text=5), tiny_sample(3, tiles=2, text=9)]
    prompts = [
        Prompt(s.input_ids.tolist(), s.image_positions.tolist(), s.pixels, torch.arange(len(s.input_ids)))
        for s in samples
    ]
    options = {"max_new_tokens": 5, "stop_ids": [0], "pad_id": 0}
    together = generate(model, prompts, **options)
    assert together == [generate(model, [prompt], **options)[0] for prompt in prompts]
    assert all(together)


def test_generation_continues_as_the_training_forward_predicts():
    model = tiny_model().eval()
    sample = tiny_sample(5, tiles=1)
    row = tiny_row([sample])
    hidden = model.llm.model(
        inputs_embeds=model.embed(row.input_ids, row.image_positions, row.pixels)[None], use_cache=False
    ).last_hidden_state
    best = int(model.llm.lm_head(hidden)[0, -1].argmax())
    counted = torch.arange(len(sample.input_ids))
    prompt = Prompt(sample.input_ids.tolist(), sample.image_positions.tolist(), sample.pixels, counted)
    assert generate(model, [prompt], max_new_tokens=1, stop_ids=[], pad_id=0) == [[best]]


def test_toy_constants_fit():
    sample = tiny_sample(1, tiles=2)
    assert len(sample.image_positions) == 2 * TOKENS_PER_TILE and sample.pixels.shape[-1] == TILE


def test_fan_in_init_keeps_the_scale_of_activations():
    torch.manual_seed(0)
    layer = torch.nn.Linear(400, 400)
    init_from_fan_in(layer)
    assert 0.9 < layer(torch.randn(64, 400)).std() < 1.1 and (layer.bias == 0).all()
