"""Published checkpoints of the libraries fit, tensor by tensor."""

import pytest
import timm
import torch
from timm.models.eva import checkpoint_filter_fn
from transformers import (
    CLIPConfig,
    CLIPModel,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    SamConfig,
    SamModel,
    SiglipConfig,
    SiglipModel,
)

from tests.model.encoders import tiny
from tests.model.encoders.tiny import TINY, pixels, randomized, relative_error

TINY_TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip_checkpoint(encoder):
    text = TINY_TEXT | {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return CLIPModel(CLIPConfig(vision_config=encoder.vit.config.to_dict(), text_config=text, projection_dim=8))


def sam_checkpoint(encoder):
    decoder = {"hidden_size": 8, "num_attention_heads": 2, "mlp_dim": 8, "num_hidden_layers": 1}
    config = SamConfig(
        vision_config=encoder.sam.config.to_dict(), mask_decoder_config=decoder | {"iou_head_hidden_dim": 8}
    )
    config.prompt_encoder_config.hidden_size = 8
    return SamModel(config)


def pix2struct_checkpoint(encoder):
    text = {"vocab_size": 10, "hidden_size": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = Pix2StructConfig(vision_config=encoder.vit.config.to_dict(), text_config=text)
    return Pix2StructForConditionalGeneration(config)


def siglip_checkpoint(encoder):
    vision = encoder.vit.config.to_dict() | {"vision_use_head": True}
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=TINY_TEXT | {"vocab_size": 10}))


def convnext_checkpoint(encoder):
    return timm.create_model("convnext_atto", depths=[1, 1, 2, 1], dims=[8, 12, 16, 24], num_classes=5)


CHECKPOINTS = {
    "clip": (clip_checkpoint, "vision_model.embeddings.class_embedding", "vision_model.", "vit."),
    "convnext": (convnext_checkpoint, "stages.2.blocks.1.gamma", "", ""),
    "sam": (sam_checkpoint, "vision_encoder.layers.0.attn.rel_pos_h", "vision_encoder.", "sam."),
    "pix2struct": (pix2struct_checkpoint, "encoder.encoder.layer.1.mlp.wi_0.weight", "encoder.", "vit."),
    "siglip": (siglip_checkpoint, "vision_model.head.probe", "vision_model.", "vit."),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_library_checkpoint_gives_every_tensor_but_no_other(kind):
    make, landmark, prefix, own_prefix = CHECKPOINTS[kind]
    encoder = TINY[kind]()
    state = randomized(make(encoder), seed=1).state_dict()
    assert landmark in state
    adapted = encoder.adapt(state)
    assert adapted.keys() == encoder.state_dict().keys() and len(adapted) < len(state)
    encoder.load_state_dict(adapted)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, state[prefix + name.removeprefix(own_prefix)]), name


@pytest.mark.parametrize("kind", ["clip", "sam", "pix2struct", "siglip"])
def test_a_bare_library_model_fits_too(kind):
    encoder = randomized(TINY[kind]())
    own_prefix = CHECKPOINTS[kind][-1]
    bare = {name.removeprefix(own_prefix): tensor for name, tensor in encoder.state_dict().items()}
    adapted = encoder.adapt(bare)
    assert adapted.keys() == encoder.state_dict().keys()


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("prefix", ["", "vision_model.", "vision_model.vision_model.", "vision_tower.vision_model."])
def test_siglip_is_found_behind_every_published_prefix_with_its_head_or_without(prefix, head):
    encoder = tiny.siglip()
    whole = randomized(siglip_checkpoint(encoder)).vision_model.state_dict()
    assert any(name.startswith("head.") for name in whole)
    state = {prefix + name: tensor for name, tensor in whole.items() if head or not name.startswith("head.")}
    adapted = encoder.adapt(state | {"language_model.lm_head.weight": torch.ones(3)})
    assert adapted.keys() == encoder.state_dict().keys()
    assert all(torch.equal(tensor, whole[name.removeprefix("vit.")]) for name, tensor in adapted.items())


def test_no_siglip_or_several_are_refused():
    state = tiny.siglip().vit.state_dict()
    with pytest.raises(ValueError, match="this one has 0"):
        tiny.siglip().adapt({"model.embed_tokens.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"this one has 2: \['a\.', 'b\.'\]"):
        tiny.siglip().adapt({prefix + name: tensor for prefix in ("a.", "b.") for name, tensor in state.items()})


def published_eva02(encoder):
    """Returns `encoder`'s tensors as a ViTDet checkpoint names them, beside those of a detector."""
    renames = {
        ".q_proj.bias": ".q_bias",
        ".v_proj.bias": ".v_bias",
        ".fc1_g.": ".w1.",
        ".fc1_x.": ".w2.",
        ".fc2.": ".w3.",
        "mlp.norm.": "mlp.ffn_ln.",
    }
    state = {"backbone.simfp_2.0.weight": torch.ones(3), "proposal_generator.anchor": torch.ones(3)}
    for name, tensor in encoder.state_dict().items():
        for timms, theirs in renames.items():
            name = name.replace(timms, theirs)
        state[f"backbone.net.{name}"] = tensor
    state["backbone.net.rope_glb.freqs_cos"] = state["backbone.net.blocks.0.attn.rope.freqs_sin"] = torch.ones(3)
    return state


def test_an_eva02_detector_gives_its_backbone():
    encoder = randomized(tiny.eva02())
    state = published_eva02(encoder)
    assert "backbone.net.blocks.1.attn.q_bias" in state and "backbone.net.blocks.0.mlp.ffn_ln.weight" in state
    adapted = tiny.eva02().adapt(state)
    assert adapted.keys() == encoder.state_dict().keys()
    assert all(torch.equal(adapted[name], tensor) for name, tensor in encoder.state_dict().items())


def test_eva02_is_renamed_as_timm_renames_it():
    encoder = randomized(tiny.eva02())
    bare = {k.removeprefix("backbone.net."): v for k, v in published_eva02(encoder).items() if "net." in k}
    positions = bare.pop("pos_embed")  # timm resamples them
    timms = checkpoint_filter_fn(bare, encoder)
    adapted = encoder.adapt(bare | {"pos_embed": positions})
    assert adapted.keys() == timms.keys() | {"pos_embed"}
    assert all(torch.equal(adapted[name], tensor) for name, tensor in timms.items())


def test_a_neck_begun_anew_is_fresh():
    state = randomized(sam_checkpoint(tiny.sam())).state_dict()
    encoder = tiny.sam(pretrained_neck=False)
    missing = encoder.state_dict().keys() - encoder.adapt(state).keys()
    assert missing == {"sam.neck.conv1.weight", "sam.neck.layer_norm1.weight", "sam.neck.layer_norm1.bias"}
    assert all(name.startswith(encoder.fresh) for name in missing)
    assert encoder.sam.neck.conv1.weight.std() > 0.01


@pytest.mark.parametrize("kind", ["siglip2", "dinov2", "dinov3", "cradio"])
def test_a_timm_checkpoint_gives_every_tensor(kind):
    source, encoder = randomized(TINY[kind]()), TINY[kind]()
    state = source.vit.state_dict() | {"attn_pool.latent": torch.ones(1, 1, 16)}
    adapted = encoder.adapt(state)
    encoder.load_state_dict(adapted)
    assert torch.equal(encoder(pixels()), source(pixels()))


@pytest.mark.parametrize("kind", ["clip", "sam", "eva02", "siglip", "siglip2", "dinov2", "dinov3", "cradio"])
def test_weights_of_another_size_are_resampled(kind):
    small, large = randomized(TINY[kind]()), {"image_size": 2 * TINY[kind]().input_size}
    if kind in ("siglip2", "dinov2"):
        large["options"] = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
        large["options"]["img_size"] = large["image_size"]
    encoder = TINY[kind](**large)
    prefix = "" if kind == "eva02" else next(iter(small.state_dict())).split(".")[0] + "."
    adapted = encoder.adapt({name.removeprefix(prefix): t for name, t in small.state_dict().items()})
    encoder.load_state_dict(adapted)
    assert encoder(pixels()).shape[-1] == 2 * small(pixels()).shape[-1]


def test_clip_positions_keep_their_pattern_when_resampled():
    encoder, large = randomized(tiny.clip()), tiny.clip(image_size=64)
    state = {name.removeprefix("vit."): tensor for name, tensor in encoder.state_dict().items()}
    table = state["embeddings.position_embedding.weight"]
    ramp = torch.arange(4.0).repeat_interleave(4)[:, None].expand(16, 16)  # grows from row to row
    state["embeddings.position_embedding.weight"] = torch.cat([table[:1], ramp])
    resampled = large.adapt(state)["vit.embeddings.position_embedding.weight"]
    assert torch.equal(resampled[0], table[0])
    rows = resampled[1:, 0].view(8, 8)
    assert torch.allclose(rows, rows[:, :1]) and (rows[1:, 0] > rows[:-1, 0]).all()
    assert relative_error(rows[2:6, 0], torch.tensor([0.75, 1.25, 1.75, 2.25])) < 0.05


def test_sam_relative_positions_are_resampled_linearly():
    encoder, large = randomized(tiny.sam()), tiny.sam(image_size=96)
    state = {name.removeprefix("sam."): tensor for name, tensor in encoder.state_dict().items()}
    adapted = large.adapt(state)
    assert adapted["sam.layers.0.attn.rel_pos_h"].shape == (7, 8)  # of windows: as it was
    assert adapted["sam.layers.1.attn.rel_pos_h"].shape == (23, 8)
    assert adapted["sam.pos_embed"].shape == (1, 12, 12, 16)
