"""Every tensor of the released Eagle 2 and 2.5 layouts has its place here, and the way back is the same."""

import pytest
import torch

from eagle_train.model.checkpoints import eagle2_config as config_of
from eagle_train.model.checkpoints.eagle2 import (
    CONVNEXT,
    HEAD,
    SIGLIP,
    is_tied,
    is_unused,
    layout,
    match,
    to_ours,
    to_released,
)
from eagle_train.model.checkpoints.eagle2_files import pooling_head, write_llm
from eagle_train.model.checkpoints.families import detect
from eagle_train.train.assemble import meta_model
from eagle_train.train.config import load_config
from eagle_train.train.released_eagle2 import TIED_HEAD, import_config, read_layout, why_not
from tests.eagle1_layout import FULL, VICUNA_13B, X5, random_weights, released_config, write_headers
from tests.eagle1_layout import released_shapes as eagle1_shapes
from tests.eagle2_layout import (
    ALONE,
    NUMBERED,
    QWEN_0_5B,
    QWEN_7B,
    SO400M,
    TINY_LLM,
    XXL,
    new_config,
    old_config,
    released_shapes,
)

SIGLIP_KEYS = 3 + 27 * 16 + 2
POOLING_KEYS = 11


def sizes(shapes):
    return {key: torch.Size(shape) for key, shape in shapes.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "shapes", "vision_keys", "parameters"),
    [
        (
            new_config(QWEN_0_5B, SO400M, tied=True),
            released_shapes(QWEN_0_5B, SO400M, tied=True),
            SIGLIP_KEYS + POOLING_KEYS,
            0.912e9,  # 0.927e9 with the pooling head and 151936 rows
        ),
        (old_config(QWEN_7B, SO400M), released_shapes(QWEN_7B, SO400M, pooling=False), SIGLIP_KEYS, None),
        (
            new_config(QWEN_7B, SO400M, tied=False),
            released_shapes(QWEN_7B, SO400M),
            SIGLIP_KEYS + POOLING_KEYS,
            8.06e9,
        ),
        (
            old_config(QWEN_7B, SO400M, several=True, convnext_size=512),
            released_shapes(QWEN_7B, SO400M, XXL),
            SIGLIP_KEYS + POOLING_KEYS + 378,
            8.91e9,
        ),
    ],
    ids=["eagle2-1b", "old-without-pooling", "eagle2.5-8b", "eagle2-9b"],
)
def test_a_release_of_full_size_fits_its_model_key_by_key(tmp_path, config, shapes, vision_keys, parameters):
    assert sum(key.startswith("vision_model.") for key in shapes) == vision_keys
    write_headers(tmp_path / "release", config, shapes, num_shards=3)  # sparse: gigabytes of zeros, none on disk
    ours = import_config(tmp_path / "release")
    model = meta_model(ours)
    assert list(why_not(model)) == []
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    known = read_layout(config, {key: torch.empty(0) for key in shapes})
    if known.tied:
        assert expected.pop(TIED_HEAD) == expected["llm.model.embed_tokens.weight"]
    found = match(sizes(shapes), expected, known)
    assert (found.missing, found.unknown, found.misshapen) == ([], [], [])
    assert sorted(found.names.values()) == sorted(expected)
    assert {key: to_released(name, known) for key, name in found.names.items()} == {key: key for key in found.names}
    assert all(".head." in key for key in found.unused)
    assert model.llm.config.vocab_size == 151676, "of the checkpoint, not of its config"
    assert model.mixture.tokens_per_tile == 256
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)


def test_the_pooling_head_has_the_published_shapes():
    model = meta_model_of(new_config(TINY_LLM), released_shapes(TINY_LLM))
    made = pooling_head(model.mixture.encoders["siglip"].vit.config, torch.bfloat16)
    theirs = {k: s for k, s in released_shapes(TINY_LLM).items() if k.startswith(f"{ALONE}head.")}
    assert {f"{ALONE}head.{name}": tuple(t.shape) for name, t in made.items()} == theirs
    assert {t.dtype for t in made.values()} == {torch.bfloat16}


def meta_model_of(config, shapes):
    vocabulary = config_of.read_vocab_size(sizes(shapes))
    base = load_config(["+experiment=toy", "mixture=eagle2_siglip", "projector=eagle2"])
    encoders = {"siglip": base["mixture"]["encoders"]["siglip"] | config_of.read_encoders(config)["siglip"]}
    llm = {"_target_": base["llm"]["_target_"]} | config_of.read_llm(config, vocabulary, tied=False)
    return meta_model(base | {"mixture": base["mixture"] | {"encoders": encoders}, "llm": llm})


def test_towers_count_from_zero_in_the_order_of_the_config():
    one, other = layout([SIGLIP, CONVNEXT], tied=False), layout([CONVNEXT, SIGLIP], tied=False)
    key = "vision_model.vision_model.vision_towers.{}.vision_tower.vision_model.post_layernorm.bias".format
    assert to_ours(key(0), one) == to_ours(key(1), other) == "mixture.encoders.siglip.vit.post_layernorm.bias"
    assert to_released("mixture.encoders.siglip.vit.post_layernorm.bias", other) == key(1)
    stem = "mixture.encoders.convnext.stem.0.bias"
    assert to_released(stem, one) == f"{NUMBERED.format(1)}stem.0.bias"
    with pytest.raises(ValueError, match=r"no place for mixture\.norms\.siglip\.bias"):
        to_released("mixture.norms.siglip.bias", one)


def test_names_that_libraries_write_otherwise_are_known():
    nested = released_shapes(TINY_LLM)
    flat = {key.replace(ALONE, "vision_model."): shape for key, shape in nested.items()}
    weights = {key: torch.empty(0) for key in flat}
    known = read_layout(new_config(TINY_LLM), weights)
    assert to_ours("vision_model.post_layernorm.bias", known) == "mixture.encoders.siglip.vit.post_layernorm.bias"
    assert is_unused("vision_model.head.probe", known) and not is_unused("vision_model.post_layernorm.bias", known)


@pytest.mark.parametrize(
    ("change", "declared", "tied"),
    [
        (lambda w: w.pop(HEAD), False, True),
        (lambda w: w.pop(HEAD), True, True),
        (lambda w: None, True, False),
        (
            lambda w: w.update({"language_model.lm_head.weight": w["language_model.model.embed_tokens.weight"]}),
            True,
            True,
        ),
        (
            lambda w: w.update({"language_model.lm_head.weight": w["language_model.model.embed_tokens.weight"]}),
            False,
            False,
        ),
    ],
    ids=["absent", "absent-and-declared", "differs", "equal", "equal-but-not-declared"],
)
def test_what_is_stored_tells_whether_the_head_is_tied(change, declared, tied):
    weights = random_weights(released_shapes(TINY_LLM))
    change(weights)
    assert is_tied(weights, declared) is tied


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_config": {"model_type": "radio"}}, "'radio'.* is not supported"),
        ({"vision_config": {"model_type": "MOB", "vision_path": "MOB:radio;palisiglip"}}, "'MOB:radio;palisiglip'"),
        ({"vision_config": None}, "is not supported; it is siglip_vision_model, or MOB"),
    ],
)
def test_other_vision_models_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        config_of.read_towers(new_config(TINY_LLM) | change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"select_layer": -4}, "select_layer -4 is not supported"),
        ({"force_image_size": 448}, "force_image_size is 448, but SigLIP's positions are for 32 px"),
    ],
)
def test_features_that_are_not_built_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        config_of.read_encoders(new_config(TINY_LLM) | change)


def test_the_fold_is_that_of_the_ratio():
    config = new_config(TINY_LLM)
    assert config_of.read_fold(config) == 2
    assert config_of.read_fold(config | {"use_pixel_shuffle": False}) == 1
    with pytest.raises(ValueError, match=r"downsample_ratio 0.4 is not 1 over"):
        config_of.read_fold(config | {"downsample_ratio": 0.4})
    with pytest.raises(ValueError, match="ps_version 'v1'"):
        config_of.read_fold(config | {"ps_version": "v1"})


def test_the_llm_is_read_in_both_forms_of_its_rotary_embedding():
    config = new_config(TINY_LLM)
    read = config_of.read_llm(config, 517, tied=True)
    assert read["rope_parameters"] == {"rope_type": "default", "rope_theta": 1000000.0}
    assert (read["vocab_size"], read["tie_word_embeddings"], read["model_type"]) == (517, True, "qwen2")
    scaled = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config["text_config"] |= {"rope_scaling": scaled}
    long = config_of.read_llm(config, 517, tied=False)
    expected = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    assert long["rope_parameters"] == expected
    again = write_llm(long, "bfloat16")
    assert config_of.read_rope(again) == expected and again["architectures"] == ["Qwen2ForCausalLM"]
    config["llm_config"] = config.pop("text_config") | {"architectures": ["MistralForCausalLM"]}
    with pytest.raises(ValueError, match="'MistralForCausalLM' is not supported; Qwen2ForCausalLM"):
        config_of.read_llm(config, 517, tied=False)


def test_the_family_is_told_by_the_config_or_by_the_keys():
    eagle1, eagle2 = eagle1_shapes(X5, VICUNA_13B, FULL, 7680), released_shapes(TINY_LLM)
    assert detect(released_config(X5, VICUNA_13B), []) == "eagle1"
    assert detect(new_config(TINY_LLM), []) == detect(old_config(TINY_LLM), []) == "eagle2"
    assert (detect({}, eagle1), detect({}, eagle2)) == ("eagle1", "eagle2")


def test_a_layout_that_is_not_known_is_compared_with_the_nearest():
    keys = ["vision_model.patch.weight", "language_model.lm_head.weight", "multi_modal_projector.w", "image_newline"]
    with pytest.raises(ValueError, match="nearest is that of eagle2: it has no mlp1") as error:
        detect({"model_type": "llava_next"}, keys)
    assert "it does not know image_newline, multi_modal_projector.w" in str(error.value)
    assert "model_type 'llava_next' is of no known layout" in str(error.value)
