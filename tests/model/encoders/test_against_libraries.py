"""Each encoder gives what the library's own model gives on the same pixels and weights."""

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionModel,
    Pix2StructImageProcessor,
    Pix2StructVisionModel,
    SamVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.model.encoders import tiny
from tests.model.encoders.tiny import TINY, pixels, randomized, relative_error


def normalized(encoder, tiles):
    images = (tiles / 255.0 - torch.tensor(encoder.mean).view(3, 1, 1)) / torch.tensor(encoder.std).view(3, 1, 1)
    return encoder.resize(images, encoder.input_size)


@torch.no_grad()
def test_clip_is_the_library_without_class_token():
    encoder = randomized(tiny.clip())
    bare = CLIPVisionModel(encoder.vit.config)
    bare.load_state_dict(encoder.vit.state_dict(), strict=False)
    tokens = bare.embeddings(normalized(encoder, pixels()))[:, 1:]
    wanted = bare.encoder(inputs_embeds=bare.pre_layrnorm(tokens)).last_hidden_state
    assert relative_error(encoder(pixels()).flatten(2).transpose(1, 2), wanted) < 1e-6


@torch.no_grad()
def test_convnext_is_the_library_without_head():
    encoder = randomized(tiny.convnext())
    bare = timm.create_model("convnext_atto", depths=[1, 1, 2, 1], dims=[8, 12, 16, 24])
    bare.load_state_dict(encoder.state_dict(), strict=False)
    assert relative_error(encoder(pixels()), bare.forward_features(normalized(encoder, pixels()))) < 1e-6


@torch.no_grad()
def test_sam_is_the_library_up_to_the_middle_of_its_neck():
    encoder = randomized(tiny.sam())
    bare = SamVisionModel(encoder.sam.config)
    bare.vision_encoder.load_state_dict(encoder.sam.state_dict(), strict=False)
    seen = []
    bare.vision_encoder.neck.layer_norm1.register_forward_hook(lambda module, inputs, out: seen.append(out))
    bare(normalized(encoder, pixels()))
    assert seen[0].shape == (2, 6, 6, 6)
    assert relative_error(encoder(pixels()), F.pixel_unshuffle(seen[0], 2)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("window", "global_layers"), [(4, [1]), (2, [0]), (4, []), (8, [0, 1])])
def test_eva02_is_timms_windowed_transformer(window, global_layers):
    encoder = randomized(tiny.eva02(window_size=window, global_layers=global_layers))
    bare = windowed_transformer(encoder, window, global_layers)
    wanted = bare.forward_features(normalized(encoder, pixels()))
    assert relative_error(encoder(pixels()), wanted) < 2e-6


def windowed_transformer(encoder, window, global_layers):
    """Returns timm's windowed ViT, which joins queries, keys and values in one layer, with `encoder`'s weights."""
    bare = VisionTransformerSAM(
        img_size=64,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=8 / 3,
        mlp_layer=lambda in_features, hidden_features, act_layer, drop, **kwargs: SwiGLU(
            in_features, hidden_features, norm_layer=lambda dim, **dd: nn.LayerNorm(dim, eps=1e-6), drop=drop, **kwargs
        ),
        use_rope=True,
        use_rel_pos=False,
        window_size=window,
        global_attn_indexes=tuple(global_layers),
        ref_feat_shape=((4, 4), (4, 4)),
        neck_chans=0,
        num_classes=0,
    )
    weights = dict(encoder.state_dict())
    positions = weights["pos_embed"][:, 1:].view(1, 3, 3, 16).permute(0, 3, 1, 2)  # without the class token's
    weights["pos_embed"] = F.interpolate(positions, size=(8, 8), mode="bicubic").permute(0, 2, 3, 1)
    for i in range(2):
        q, k, v = (f"blocks.{i}.attn.{name}_proj" for name in "qkv")
        weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat([weights.pop(f"{name}.weight") for name in (q, k, v)])
        biases = [weights.pop(f"{q}.bias"), torch.zeros(16), weights.pop(f"{v}.bias")]  # EVA's keys have no bias
        weights[f"blocks.{i}.attn.qkv.bias"] = torch.cat(biases)
    bare.neck = nn.Identity()  # a final norm
    bare.load_state_dict(weights)
    return bare


def test_eva02_keeps_its_rotary_tables_in_float32():
    encoder = tiny.eva02().to(torch.bfloat16)
    assert encoder.rotary_table(4, torch.device("cpu")).dtype == torch.float32
    assert not list(encoder.buffers())


@torch.no_grad()
def test_pix2struct_is_the_library_with_its_own_processor():
    encoder = randomized(tiny.pix2struct()).double()
    bare = Pix2StructVisionModel(encoder.vit.config).double()
    bare.load_state_dict(encoder.vit.state_dict())
    tiles = pixels()
    processor = Pix2StructImageProcessor(patch_size={"height": 4, "width": 4}, max_patches=40)
    inputs = processor(list(tiles), return_tensors="pt")
    assert inputs["attention_mask"].sum(dim=1).tolist() == [36, 36]  # of 40: the rest is padding
    patches = inputs["flattened_patches"].double()
    # The library's deviation is that of a sample, over N - 1; the published pre-processing's, and ours, over N.
    patches[..., 2:] *= (6912 / 6911) ** 0.5
    wanted = bare(patches, inputs["attention_mask"].double()).last_hidden_state[:, :36]
    assert relative_error(encoder(tiles).flatten(2).transpose(1, 2), wanted) < 1e-5


def bare_siglip(num_layers):
    """Returns transformers' whole SigLIP vision model, pooling head included, with drawn weights."""
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return randomized(SiglipVisionModel(SiglipVisionConfig(**shape, num_hidden_layers=num_layers))).eval()


@torch.no_grad()
def test_siglip_is_the_library_after_its_final_norm():
    bare, encoder = bare_siglip(2), tiny.siglip()
    encoder.load_state_dict(encoder.adapt(bare.state_dict()))
    wanted = bare(normalized(encoder, pixels())).last_hidden_state
    assert torch.equal(encoder(pixels()).flatten(2).transpose(1, 2), wanted)


@torch.no_grad()
@pytest.mark.parametrize("select_layer", [-2, -3, -4, 1, 2, 3, 4])
def test_siglip_stops_at_a_hidden_state(select_layer):
    bare, encoder = bare_siglip(4), tiny.siglip(num_hidden_layers=4, select_layer=select_layer)
    encoder.load_state_dict(encoder.adapt(bare.state_dict()))
    wanted = bare(normalized(encoder, pixels()), output_hidden_states=True).hidden_states
    assert len(wanted) == 5
    assert torch.equal(encoder(pixels()).flatten(2).transpose(1, 2), wanted[select_layer])
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count + sum(encoder.not_built.values()) == sum(parameter.numel() for parameter in bare.parameters())


def test_siglip_attends_with_torchs_own_kernels_whatever_the_size():
    encoder = tiny.siglip()
    assert encoder.vit.config._attn_implementation == "sdpa"
    assert encoder(pixels(), 8).shape[2:] == (1, 1)
    assert encoder(pixels(), 56).shape[2:] == (7, 7)


@pytest.mark.parametrize("select_layer", [-5, 0, 5, -6])
def test_siglip_has_no_features_before_its_first_layer_or_after_its_last(select_layer):
    with pytest.raises(ValueError, match=f"select_layer {select_layer} .* -4 to -1, or 1 to 4"):
        tiny.siglip(num_hidden_layers=4, select_layer=select_layer)


LEARNT = {"img_size": 32, "dynamic_img_size": True}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "name", "options", "prefix"),
    [
        ("siglip2", "vit_so400m_patch16_siglip_384", LEARNT, 0),
        ("dinov2", "vit_large_patch14_dinov2", LEARNT, 1),
        ("dinov3", "vit_large_patch16_dinov3", {}, 5),
        ("cradio", "naflexvit_so400m_patch16_radio_v4", {"pos_embed_grid_size": (6, 6)}, 10),
    ],
)
def test_timm_vit_is_the_library_without_prefix_tokens(kind, name, options, prefix):
    encoder = randomized(TINY[kind]())
    bare = timm.create_model(name, num_classes=0, patch_size=8, embed_dim=16, depth=2, num_heads=2, **options)
    absent, unknown = bare.load_state_dict(encoder.vit.state_dict(), strict=False)
    assert not unknown and all(part.startswith(("attn_pool.", "fc_norm.")) for part in absent)  # the head
    tokens = bare.forward_features(normalized(encoder, pixels()))
    assert tokens.shape[1] == prefix + 16
    assert torch.equal(encoder(pixels()).flatten(2).transpose(1, 2), tokens[:, prefix:])
