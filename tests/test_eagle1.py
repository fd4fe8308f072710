"""The nine Eagle 1 experiments on the meta device: exactly the published shapes."""

import math

import pytest

from eagle_train.tools.plan import make_plan
from tests.configs import composed

COMPONENTS = {  # parameters as published, with what is never used
    "clip": 303_507_456,
    "convnext": 846_471_016,
    "sam": 307_687_936,
    "det": 303_388_608,
    "pix2struct": 512_812_032,
}
NOT_BUILT = {"clip": 2_048, "convnext": 3_079_144}  # CLIP's post-norm, ConvNeXt's norm and classifier
X4 = ("clip", "convnext", "pix2struct", "det")
X5 = ("clip", "convnext", "sam", "pix2struct", "det")
VICUNA_7B, VICUNA_13B, LLAMA3_8B, YI_34B = 6_738_415_616, 13_015_864_320, 8_030_261_248, 34_388_917_248
EXPERIMENTS = {  # encoders, LLM, projector, published total
    "eagle-x4-7b": (X4, VICUNA_7B, 44_048_384, 8_748_643_112),
    "eagle-x5-7b": (X5, VICUNA_7B, 48_242_688, 9_060_525_352),
    "eagle-x4-13b": (X4, VICUNA_13B, 60_303_360, 15_042_346_792),
    "eagle-x5-13b": (X5, VICUNA_13B, 65_546_240, 15_355_277_608),
    "eagle-x5-13b-chat": (X5, VICUNA_13B, 65_546_240, 15_355_277_608),
    "eagle-x4-8b-plus": (X4, LLAMA3_8B, 44_048_384, 10_040_488_744),
    "eagle-x4-13b-plus": (X4, VICUNA_13B, 60_303_360, 15_042_346_792),
    "eagle-x5-8b": (X5, LLAMA3_8B, 48_242_688, 10_352_370_984),
    "eagle-x5-34b-plus": (X5, YI_34B, 106_444_800, 36_769_229_096),
}


QUICK = "eagle-x5-13b"  # every encoder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in EXPERIMENTS]
)
def test_plan_has_the_published_parameters(name, tmp_path):
    encoders, llm, projector, total = EXPERIMENTS[name]
    plan = make_plan(composed(f"+experiment={name}") | {"data_root": str(tmp_path)}, ranks=32)
    assert plan["experiment"] == name and [stage["name"] for stage in plan["stages"]] == ["pretrain", "sft"]
    built = {f"mixture.encoders.{e}": COMPONENTS[e] - NOT_BUILT.get(e, 0) for e in encoders}
    expected = built | {"projector": projector, "llm": llm}
    for stage in plan["stages"]:
        modules = stage["parameters"]["modules"]
        assert {module: counts["total"] for module, counts in modules.items()} == expected
        assert list(modules) == list(expected)  # in the order of the concatenation
    pretrain, sft = (stage["parameters"] for stage in plan["stages"])
    assert pretrain["trainable"] == projector and sft["trainable"] == sft["total"]
    assert sum(map(sum_of, plan["not_built"].values())) + sft["total"] == total == plan["published_parameters"]
    assert {e: sum_of(parts) for e, parts in plan["not_built"].items()} == {
        f"mixture.encoders.{e}": NOT_BUILT[e] for e in encoders if e in NOT_BUILT
    }


def sum_of(parts):
    return sum(parts.values())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [8, 96])
def test_any_number_of_ranks_holds_the_global_batch(ranks, tmp_path):
    plan = make_plan(composed("+experiment=eagle-x5-7b") | {"data_root": str(tmp_path)}, ranks)
    assert [stage["rows_per_step"] for stage in plan["stages"]] == [256, 128]
    assert [stage["micro_batches"] for stage in plan["stages"]] == [math.ceil(256 / ranks), math.ceil(128 / ranks)]


VICUNA, LLAMA3, YI = "vicuna_v1", "llama3", "yi_chatml"
PUBLISHED = {  # template; recipe, projector's rate, rows and template of stage 1; recipe, rows, tokens of stage 2; ZeRO
    "eagle-x4-7b": (VICUNA, ("558k", 1e-3, 256, "plain"), ("1.8m", 128, 2048), 2),
    "eagle-x5-7b": (VICUNA, ("558k", 1e-3, 256, "plain"), ("1.8m", 128, 2048), 2),
    "eagle-x4-13b": (VICUNA, ("558k", 1e-3, 256, "plain"), ("1.8m", 128, 2048), 2),
    "eagle-x5-13b": (VICUNA, ("558k", 1e-3, 256, "plain"), ("1.8m", 128, 2048), 2),
    "eagle-x5-13b-chat": (VICUNA, ("558k", 1e-3, 256, "plain"), ("1.8m", 128, 2048), 2),
    "eagle-x5-8b": (LLAMA3, ("558k", 1e-3, 256, "plain"), ("1.8m", 128, 2048), 2),
    "eagle-x4-8b-plus": (LLAMA3, ("558k", 1e-3, 256, "plain"), ("cambrian-7m", 128, 3072), 2),
    "eagle-x4-13b-plus": (VICUNA, ("558k", 1e-3, 256, "plain"), ("cambrian-7m", 128, 2048), 2),
    "eagle-x5-34b-plus": (YI, ("cambrian-alignment-2.5m", 2e-4, 1024, None), ("cambrian-7m", 1024, 2048), 3),
}
PREFIXES = {  # before the assistant's answer
    VICUNA: "ASSISTANT:",
    LLAMA3: "<|start_header_id|>assistant<|end_header_id|>\n\n",
    YI: "<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_hyperparameters_are_the_published_ones(name):
    template, (first_recipe, rate, first_rows, first_template), (recipe, rows, tokens), zero_stage = PUBLISHED[name]
    config = composed(f"+experiment={name}")
    assert config["chat_template"]["prefix"]["assistant"] == PREFIXES[template]
    assert config["engine"]["zero_stage"] == zero_stage and config["engine"]["activation_checkpointing"]
    assert config["data"]["tile_size"] == 1024
    pretrain, sft = config["schedule"]["pretrain"], config["schedule"]["sft"]
    assert pretrain["recipe"].endswith(first_recipe) and sft["recipe"].endswith(recipe)
    assert pretrain["learning_rates"] == {"mixture": None, "projector": rate, "llm": None}
    assert sft["learning_rates"] == {"mixture": 2e-5, "projector": 2e-5, "llm": 2e-5}
    assert (pretrain["rows_per_step"], sft["rows_per_step"], sft["max_length"]) == (first_rows, rows, tokens)
    assert (pretrain["chat_template"] is None) == (first_template is None)
    if first_template == "plain":
        assert pretrain["chat_template"]["keep_user_text"] is False
    for stage in (pretrain, sft):
        assert (stage["num_epochs"], stage["warmup_ratio"], stage["min_lr_ratio"]) == (1, 0.03, 0.0)
        assert (stage["weight_decay"], stage["betas"], stage["eps"]) == (0.0, [0.9, 0.999], 1e-8)
        assert stage["max_grad_norm"] is None


@pytest.mark.slow
def test_presets_differ_in_what_the_specification_lists():
    parity, better = (composed("+experiment=eagle-x5-8b", f"preset={name}") for name in ("parity", "better"))
    for config, clip in ((parity, None), (better, 1.0)):
        assert [stage["max_grad_norm"] for stage in config["schedule"].values()] == [clip, clip]
    assert parity["schedule"]["pretrain"]["tiling"]["_target_"].endswith("CentreCrop")
    assert better["schedule"]["pretrain"]["tiling"] is None
    begin = "<|begin_of_text|>"
    assert (parity["chat_template"]["start"], better["chat_template"]["start"]) == (2 * begin, begin)
    encoders = [config["mixture"]["encoders"] for config in (parity, better)]
    assert [e["clip"]["image_size"] for e in encoders] == [336, 448]
    assert [e["sam"]["pretrained_neck"] for e in encoders] == [False, True]
    assert [e["clip"]["resize"]["path"].rpartition(".")[2] for e in encoders] == ["aligned", "antialiased"]
    assert "resample" not in parity["mixture"]  # aligned is the default
    assert better["mixture"]["resample"]["path"].endswith("antialiased")
