"""Every tensor of the released Eagle 1 layout has its place here, and the way back is the same."""

import json

import pytest
import torch

from eagle_train.model.checkpoints.eagle1 import TOWERS, is_unused, match, to_ours, to_released, unused_parts
from eagle_train.model.checkpoints.eagle1_config import read_llm, read_projector_depth, read_towers, write_config
from eagle_train.model.checkpoints.files import read_weights
from eagle_train.train.assemble import meta_model
from eagle_train.train.released_eagle1 import differences, import_config, released_towers
from tests.eagle1_layout import (
    CHANNELS,
    FULL,
    LLAMA3_8B,
    TINY,
    TOWER_SHAPES,
    VICUNA_13B,
    X4,
    X5,
    X5_OF_THE_SCRIPTS,
    random_weights,
    released_config,
    released_shapes,
    write_headers,
)

PUBLISHED = {tower: len(TOWER_SHAPES[tower](**FULL[tower])) for tower in CHANNELS}


def test_generated_checkpoints_have_the_published_number_of_keys():
    assert PUBLISHED == {
        "clip-448": 391,
        "convnext-1024": 380,
        "sam-1024": 342,
        "det-1024": 511,
        "pix2struct-1024": 167,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("towers", "llm", "vision_keys", "total"),
    [
        (X5, VICUNA_13B, 1791, 15_355_277_608),
        (X5_OF_THE_SCRIPTS, VICUNA_13B, 1791, 15_355_277_608),
        (X4, LLAMA3_8B, 1449, 10_040_488_744 + 8_192),
        ("clip-448;convnext-1024", LLAMA3_8B, 391 + 380, None),
    ],
    ids=["x5-13b", "x5-13b-other-order", "x4-8b-plus", "x2-8b"],
)
def test_a_release_of_full_size_fits_its_model_key_by_key(tmp_path, towers, llm, vision_keys, total):
    shapes = released_shapes(towers, llm, FULL, sum(CHANNELS[name] for name in towers.split(";")))
    assert sum("vision_tower" in key for key in shapes) == vision_keys
    (tmp_path / "config.json").write_text(json.dumps(released_config(towers, llm)))
    model, known = meta_model(import_config(tmp_path)), read_towers(released_config(towers, llm))
    found = match(sizes(shapes), {n: t.shape for n, t in model.state_dict().items()}, known)
    assert (found.missing, found.unknown, found.misshapen) == ([], [], [])
    assert sorted(found.names.values()) == sorted(model.state_dict())
    assert {key: to_released(name, known) for key, name in found.names.items()} == {key: key for key in found.names}
    assert [known[name].released for name in model.mixture.encoders] == towers.split(";")
    assert list(released_towers(model)) == list(known) and differences(model, known) == []
    if total is not None:
        not_built = sum(torch.Size(shapes[key]).numel() for key in found.unused if "freqs" not in key)
        assert not_built == 3_081_192  # CLIP's last norm, ConvNeXt's norm and classifier
        assert sum(p.numel() for p in model.parameters()) + not_built == total


def sizes(shapes):
    return {key: torch.Size(shape) for key, shape in shapes.items()}


@pytest.mark.slow
def test_headers_of_full_size_are_read_shard_by_shard(tmp_path):
    shapes = released_shapes(X5, VICUNA_13B, FULL, 7680)
    write_headers(tmp_path / "release", released_config(X5, VICUNA_13B), shapes, num_shards=7)  # 31 GB, none on disk
    weights = read_weights(tmp_path / "release")
    assert {key: tensor.shape for key, tensor in weights.items()} == sizes(shapes)
    assert sum(t.numel() for key, t in weights.items() if "freqs" not in key) == 15_355_277_608


def tiny_release(towers=X5, llm=None):
    llm = llm or {**VICUNA_13B, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9, "num_hidden_layers": 1}
    return random_weights(released_shapes(towers, llm | {"num_attention_heads": 2, "num_key_value_heads": 2}, TINY, 8))


def test_unused_parts_are_those_that_are_left_out():
    weights, towers = tiny_release(), read_towers(released_config(X5, VICUNA_13B))
    used = {key: tensor for key, tensor in weights.items() if not is_unused(key, towers)}
    made = unused_parts(used, towers)
    assert {key: (t.shape, t.dtype) for key, t in made.items()} == {
        key: (t.shape, t.dtype) for key, t in weights.items() if key not in used
    }
    assert len({tensor.data_ptr() for tensor in made.values()}) == len(made)


def test_rotary_tables_are_the_published_ones():
    towers = read_towers(released_config("det-1024", VICUNA_13B))
    weights = {k: t.float() for k, t in tiny_release("det-1024").items() if not is_unused(k, towers)}
    made = unused_parts(weights, towers)
    prefix = "model.vision_tower.vision_towers.0.vision_tower."
    frequencies = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    for name, side, block in (("rope_win", 16, 0), ("rope_glb", 64, 2)):
        steps = torch.arange(side, dtype=torch.float64) / side * 16
        angles = torch.outer(steps, frequencies).repeat_interleave(2, dim=1)  # interleaved pairs
        rows, columns = angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)
        expected = torch.cat([rows, columns], dim=1)
        for kind, function in (("cos", torch.cos), ("sin", torch.sin)):
            table = made[f"{prefix}{name}.freqs_{kind}"]
            torch.testing.assert_close(table, function(expected).float(), rtol=0, atol=2e-6)
            assert torch.equal(table, made[f"{prefix}blocks.{block}.attn.rope.freqs_{kind}"])


def test_order_in_the_config_decides_which_tower_is_which():
    towers = read_towers(released_config(X5, VICUNA_13B))
    swapped = read_towers(released_config(X5_OF_THE_SCRIPTS, VICUNA_13B))
    key = "model.vision_tower.vision_towers.{}.vision_tower.pos_embed".format
    assert to_ours(key(4), towers) == to_ours(key(3), swapped) == "mixture.encoders.det.pos_embed"
    assert to_released("mixture.encoders.det.pos_embed", towers) == key(4)


def judge(change):
    """Returns the match of a tiny release whose tensors `change` has altered, with those of the unaltered one."""
    weights, towers = tiny_release(), read_towers(released_config(X5, VICUNA_13B))
    ours = {to_ours(key, towers): t.shape for key, t in weights.items() if not is_unused(key, towers)}
    change(weights)
    return match({key: t.shape for key, t in weights.items()}, ours, towers)


TOWER = "model.vision_tower.vision_towers.0.vision_tower.vision_model."


def test_old_buffers_and_missing_unused_parts_are_harmless():
    def change(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
        weights[f"{TOWER}embeddings.position_ids"] = torch.zeros(1, 577)
        del weights[f"{TOWER}post_layernorm.weight"]

    found = judge(change)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in found.unused
    assert f"{TOWER}embeddings.position_ids" in found.unused
    found.demand()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda w: w.pop(f"{TOWER}pre_layrnorm.bias"), "1 missing: .*pre_layrnorm.bias"),
        (lambda w: w.update({"model.image_newline": torch.zeros(8)}), "1 without a place.*: model.image_newline"),
        (lambda w: w.update({f"{TOWER}extra": torch.zeros(8)}), "1 without a place.*: .*vision_model.extra"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(10, 8)}), r"misshapen: .*\(10, 8\) instead of \(9, 8\)"),
    ],
)
def test_what_would_change_the_model_is_fatal(change, said):
    with pytest.raises(ValueError, match=said):
        judge(change).demand()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mm_hidden_size": 7681}, "mm_hidden_size is 7681, but .* have 7680 channels"),
        ({"mm_vision_tower": "clip-448;dino-1024"}, r"has \['dino-1024'\]; known are clip-448"),
        ({"mm_vision_tower": "clip-448;clip-448", "mm_hidden_size": 2048}, "1024 channels"),
        ({"mm_vision_tower": None}, "known are clip-448"),
    ],
)
def test_towers_that_cannot_be_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        read_towers(released_config(X5, VICUNA_13B) | change)


def test_scaled_rotary_embeddings_and_other_projectors_are_refused():
    with pytest.raises(ValueError, match="rope_scaling"):
        read_llm(released_config(X5, VICUNA_13B) | {"rope_scaling": {"type": "linear", "factor": 2.0}})


def test_the_rotary_base_is_read_as_either_transformers_writes_it():
    old = {name: value for name, value in released_config(X5, VICUNA_13B).items() if name != "rope_scaling"}
    new = {name: value for name, value in old.items() if name != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    for config in (old | {"rope_theta": 500000.0}, new | {"rope_parameters": rope}):
        assert read_llm(config)["rope_parameters"] == rope
    with pytest.raises(ValueError, match="'rope_type': 'llama3'"):
        read_llm(new | {"rope_parameters": rope | {"rope_type": "llama3", "factor": 8.0}})
    with pytest.raises(ValueError, match="'linear' is not supported"):
        read_projector_depth(released_config(X5, VICUNA_13B) | {"mm_projector_type": "linear"})
    with pytest.raises(ValueError, match=r"lacks \['vocab_size'\]"):
        read_llm({k: v for k, v in released_config(X5, VICUNA_13B).items() if k != "vocab_size"})


@pytest.mark.slow
def test_config_json_comes_back_with_fields_that_nobody_knows(tmp_path):
    original = released_config(X5, LLAMA3_8B) | {"rope_theta": 500000.0, "mm_projector_type": "mlp3x_gelu"}
    write_headers(tmp_path / "release", original, {"w": (1,)}, num_shards=1)
    model = meta_model(import_config(tmp_path / "release"))
    towers = read_towers(original)
    written = write_config(model.llm.config.to_dict(), towers, 3, "bfloat16", 4096, original)
    assert {name: written[name] for name in original} == original
    assert written.keys() >= {"image_aspect_ratio", "tokenizer_padding_side", "mm_vision_select_layer"}


def test_every_tower_is_described_once():
    assert {tower.released for tower in TOWERS} == CHANNELS.keys()
    assert {tower.released: tower.channels for tower in TOWERS} == CHANNELS
