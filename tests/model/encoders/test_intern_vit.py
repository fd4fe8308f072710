"""InternViT: transformers' own on the same weights, with stochastic depth that transformers' has not."""

import pytest
import torch
from transformers import InternVLVisionConfig, InternVLVisionModel

from tests.model.encoders import tiny
from tests.model.encoders.test_against_libraries import normalized
from tests.model.encoders.tiny import pixels, randomized, relative_error


def library(encoder, *, qk_norm):
    """Returns transformers' InternViT with an encoder's weights."""
    config = InternVLVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
        use_qk_norm=qk_norm,
        attn_implementation="eager",
    )
    bare = InternVLVisionModel(config).eval()
    weights = {}
    renamed = {
        "class_embedding": "cls_token",
        "patch_embedding.": "patch_embeddings.projection.",
        "position_embedding": "position_embeddings",
        "encoder.layers.": "encoder.layer.",
        "attn.proj.": "attention.projection_layer.",
        "attn.": "attention.",
        "norm1.": "layernorm_before.",
        "norm2.": "layernorm_after.",
        "ls1": "lambda_1",
        "ls2": "lambda_2",
    }
    for name, tensor in encoder.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace(".qkv.", f".{letter}_proj.")] = part
        else:
            weights[name] = tensor
    bare.load_state_dict(weights)
    return bare


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_is_the_library_without_its_class_token(qk_norm):
    encoder = randomized(tiny.intern_vit(qk_norm=qk_norm, drop_path=0.3)).eval()
    bare = library(encoder, qk_norm=qk_norm)
    for side in (32, 8, 56):  # its own, a placeholder's, a larger one: positions are resampled bicubically
        images = torch.nn.functional.interpolate(normalized(encoder, pixels()), size=(side, side))
        wanted = bare(images).last_hidden_state[:, 1:]
        assert relative_error(encoder.encode(images).flatten(2).transpose(1, 2), wanted) < 1e-6


def test_layers_are_left_out_in_training_alone_the_last_most_often():
    encoder = randomized(tiny.intern_vit(num_hidden_layers=3, drop_path=0.5))
    assert [layer.drop_path.drop_prob for layer in encoder.layers] == [0.0, 0.25, 0.5]
    tiles = pixels(1).expand(400, -1, -1, -1)
    with torch.no_grad():
        seen = encoder.eval()(tiles)
        assert torch.equal(seen, seen[:1].expand_as(seen))
        torch.manual_seed(0)
        trained = encoder.train()(tiles)
    # Two branches in each of two layers, each there or not: 16 ways to go.
    ways, counts = trained.flatten(1).round(decimals=3).unique(dim=0, return_counts=True)
    assert len(ways) == 16
    both_kept = 0.75**2 * 0.5**2 * 400
    assert 0.5 * both_kept < max(counts) < 1.8 * both_kept


def test_what_is_recomputed_leaves_out_the_same_layers():
    encoder = randomized(tiny.intern_vit(drop_path=0.5)).train()

    def gradients():
        encoder.zero_grad()
        torch.manual_seed(3)
        (encoder(pixels(8)) ** 2).sum().backward()
        return [parameter.grad.clone() for parameter in encoder.parameters()]

    kept = gradients()
    encoder.set_activation_checkpointing()
    for one, other in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_positions_of_another_grid_are_resampled_on_the_way_in():
    encoder, large = randomized(tiny.intern_vit()), tiny.intern_vit(image_size=64)
    state = {f"vision_model.{name}": tensor for name, tensor in encoder.state_dict().items()} | {"mlp1.0.bias": None}
    adapted = large.adapt(state)
    assert adapted.keys() == large.state_dict().keys()
    table = adapted["embeddings.position_embedding"]
    assert table.shape == (1, 65, 16) and torch.equal(table[:, 0], encoder.embeddings.position_embedding[:, 0])
    assert encoder.adapt(encoder.state_dict()).keys() == encoder.state_dict().keys()
