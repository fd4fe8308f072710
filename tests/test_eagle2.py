"""The Eagle 2 and 2.5 experiments on the meta device: the published shapes, stages and hyperparameters."""

import pytest
from rich.console import Console

from eagle_train.data.recipe import load_recipe
from eagle_train.tools.plan import make_plan, show
from eagle_train.train.assemble import build_schedule, meta_model
from eagle_train.train.optim import freeze, freeze_table
from tests.configs import composed


def linear(fan_in, fan_out):
    return fan_in * fan_out + fan_out


def norm(width):
    return 2 * width


def qwen(vocab, width, mlp, layers, kv_heads, head=64, *, tied=False):
    """Returns the parameters of Qwen2.5: biases of queries, keys and values only; RMS norms; SwiGLU."""
    attention = linear(width, width) + 2 * linear(width, kv_heads * head) + width * width
    return (1 if tied else 2) * vocab * width + layers * (attention + 3 * width * mlp + 2 * width) + width


def convnext_blocks(depth, width):
    return depth * (linear(7 * 7, width) + norm(width) + linear(width, 4 * width) + linear(4 * width, width) + width)


def connector(channels, width):
    return norm(channels) + linear(channels, width) + linear(width, width)


ATTENTION, MLP = 4 * linear(1152, 1152), linear(1152, 4304) + linear(4304, 1152)
SIGLIP = linear(3 * 14 * 14, 1152) + 32 * 32 * 1152 + 27 * (ATTENTION + MLP + 2 * norm(1152)) + norm(1152)
SIGLIP_HEAD = 1152 + ATTENTION + norm(1152) + MLP  # of the published towers, never used
CONVNEXT = (
    linear(3 * 4 * 4, 384)
    + norm(384)
    + sum(convnext_blocks(depth, width) for depth, width in ((3, 384), (4, 768), (30, 1536), (3, 3072)))
    + sum(norm(width) + linear(4 * width, 2 * width) for width in (384, 768, 1536))
)
ONE, MOVE = {"siglip": SIGLIP}, {"siglip": SIGLIP, "convnext": CONVNEXT}
QWEN_7B = qwen(152064, 3584, 18944, 28, 4, head=128)
SHAPES = {  # encoders, connector, LLM; total with SigLIP's head, and in billions as published
    "eagle2-1b": (ONE, connector(4608, 896), qwen(151936, 896, 4864, 24, 2, tied=True), 927_540_800, 0.9),
    "eagle2-2b": (ONE, connector(4608, 1536), qwen(151936, 1536, 8960, 28, 2, head=128, tied=True), 1_981_729_216, 2.0),
    "eagle2-9b": (MOVE, connector(7680, 3584), QWEN_7B, 8_927_966_528, 8.9),
    "eagle2-34b": (MOVE, connector(7680, 5120), qwen(152064, 5120, 27648, 64, 8, head=128), 34_101_395_264, 34.1),
    "eagle2.5-8b": (ONE, connector(4608, 3584), QWEN_7B, 8_073_558_464, 8.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_the_published_ones(name):
    encoders, projector, llm, total, billions = SHAPES[name]
    config = composed(f"+experiment={name}")
    model = meta_model(config)
    expected = {f"mixture.encoders.{e}": count for e, count in encoders.items()} | {"projector": projector, "llm": llm}
    for stage, settings in build_schedule(config).items():
        freeze(model, settings.learning_rates)
        rows = freeze_table(model, settings.learning_rates)
        assert {row.module: row.total for row in rows} == expected  # in the order of the concatenation
        trained = {"projector": projector} if stage == "stage1" else expected
        assert {row.module: row.trainable for row in rows if row.trainable} == trained
    assert sum(expected.values()) + SIGLIP_HEAD == total and round(total / 1e9, 1) == billions
    assert model.mixture.encoders["siglip"].not_built == {"head": SIGLIP_HEAD}


@pytest.mark.slow
def test_eagle2_5_runs_on_qwen3_and_siglip2_too():
    overrides = ["llm=qwen3_8b", "tokenizer=Qwen/Qwen3-8B", "mixture=eagle2_siglip2"]
    model = meta_model(composed("+experiment=eagle2.5-8b", *overrides))
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 128  # norms of queries and keys instead of biases
    llm = 2 * 151936 * 4096 + 36 * (attention + 3 * 4096 * 12288 + 2 * 4096) + 4096
    assert sum(p.numel() for p in model.llm.parameters()) == llm == 8_190_735_360
    assert sum(p.numel() for p in model.projector.parameters()) == connector(4608, 4096)


EAGLE2 = {  # recipe, projector's rate, rate of all else, tokens of a row, rows of a step
    "stage1": ("allava-1.2m", 2e-4, None, 4096, 1024),
    "stage1_5": ("eagle2-stage1.5", 2e-5, 2e-5, 8192, 1024),
    "stage2": ("eagle2-stage2", 2e-5, 2e-5, 16384, 256),
}
SMALL = {name: (stage[0], *(4e-5 if rate == 2e-5 else rate for rate in stage[1:])) for name, stage in EAGLE2.items()}
STAGES = {
    "eagle2-1b": SMALL,
    "eagle2-2b": SMALL,
    "eagle2-9b": EAGLE2,
    "eagle2-34b": EAGLE2,
    "eagle2.5-8b": {
        "stage1": ("allava-1.2m", 2e-4, None, 4096, 1024),
        "stage1_5": ("eagle2.5-stage1.5", 2e-5, 2e-5, 8192, 1024),
        "stage2_32k": ("eagle2.5-long", 2e-5, 2e-5, 32768, 256),
        "stage3_64k": ("eagle2.5-long", 2e-5, 2e-5, 65536, 128),
        "stage4_128k": ("eagle2.5-long", 2e-5, 2e-5, 131072, 128),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_published_hyperparameters(name):
    schedule = composed(f"+experiment={name}")["schedule"]
    assert list(schedule) == list(STAGES[name])
    for stage, (recipe, rate, rest, tokens, rows) in STAGES[name].items():
        found = schedule[stage]
        assert found["recipe"] == recipe and load_recipe(recipe)
        assert found["learning_rates"] == {"mixture": rest, "projector": rate, "llm": rest}
        assert (found["max_length"], found["rows_per_step"], found["tokens_per_step"]) == (tokens, rows, None)
        # of the published scripts, the papers do not say
        assert (found["num_epochs"], found["num_steps"], found["seed"]) == (1, None, 0)
        assert (found["warmup_ratio"], found["min_lr_ratio"], found["weight_decay"]) == (0.03, 0.0, 0.05)
        assert (found["betas"], found["eps"], found["max_grad_norm"]) == ([0.9, 0.999], 1e-8, 1.0)


ZERO_STAGES = {"eagle2-1b": 2, "eagle2-2b": 2, "eagle2-9b": 3, "eagle2-34b": 3, "eagle2.5-8b": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero_stage"), ZERO_STAGES.items())
def test_images_prompts_loss_and_sharding_are_those_of_eagle2(name, zero_stage):
    config = composed(f"+experiment={name}")
    data, tiling = config["data"], config["data"]["tiling"]
    assert data["tile_size"] == tiling["tile_size"] == 448 and tiling["_target_"].endswith("ImageAreaPreservation")
    assert (tiling["min_tiles"], tiling["max_tiles"], tiling["thumbnail"]) == (1, 12, True)
    assert data["loss_weight"]["path"] == "eagle_train.data.loss_weights.square_root"
    template = config["chat_template"]
    assert template["system"] == "You are a helpful assistant."
    assert template["prefix"]["assistant"] == "<|im_start|>assistant\n" and template["media"]["prefix"] == "<img>"
    frames = {"eagle2.5-8b": "Frame {number} sample at {seconds:.2f}s: "}
    assert template["media"]["frame"] == frames.get(name, "Frame {number} sampled at {seconds:.2f} seconds: ")
    assert config["engine"]["zero_stage"] == zero_stage and config["engine"]["activation_checkpointing"]
    assert config["tokenizer"] == config["llm"]["pretrained"]


@pytest.mark.slow
def test_long_stages_fit_media_to_their_rows_and_others_do_not():
    for name in STAGES:
        config = composed(f"+experiment={name}")
        last = list(config["schedule"].values())[-1]
        assert config["degrade"] == last.get("degrade", config["degrade"]), "evaluated and exported as trained last"
        for stage, found in config["schedule"].items():
            if found["max_length"] < 32768:
                policy = found.get("degrade", config["degrade"])
                assert policy["_target_"].endswith("EachByItself"), stage
                continue
            assert found["degrade"]["_target_"].endswith("AutomaticDegradeSampling")
            assert found["degrade"]["frames"]["fps"] == 2.0 and found["degrade"]["tile_caps"] == [12, 8, 6, 4, 2, 1]


@pytest.mark.slow
def test_positions_reach_as_far_as_the_longest_rows():
    for name in STAGES:
        config = composed(f"+experiment={name}")
        longest = max(stage["max_length"] for stage in config["schedule"].values())
        assert longest <= config["llm"]["max_position_embeddings"]
        assert config["llm"]["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.slow
def test_eagle2_5_can_be_looked_at_without_its_data(tmp_path):
    plan = make_plan(composed("+experiment=eagle2.5-8b") | {"data_root": str(tmp_path)}, ranks=128)
    assert (plan["tokens_per_tile"], plan["channels"], plan["published_parameters"]) == (256, 4608, 8_073_558_464)
    assert [stage["micro_batches"] for stage in plan["stages"]] == [8, 8, 2, 1, 1]
    assert {stage["data"]["remedy"] for stage in plan["stages"][2:]} == {"data show recipe=eagle2.5-long"}
    assert [len(stage["data"]["missing_sources"]) for stage in plan["stages"]] == [1, 163, 162, 162, 162]
    console = Console(record=True, width=200)
    show(plan, console)
    shown = console.export_text()
    assert "rows of 131072 tokens, 128 per step (1 per rank)" in shown
    assert "not on this machine: eagle2_llava_150k_en, " in shown and " and 151 more" in shown


def test_eagle2_5_can_begin_with_the_weights_of_stage_1_5():
    without = ("~schedule.stage1", "~schedule.stage1_5", "init_from=runs/eagle2-stage1.5")
    config = composed("+experiment=eagle2.5-8b", *without)
    assert list(build_schedule(config)) == ["stage2_32k", "stage3_64k", "stage4_128k"]


@pytest.mark.parametrize("name", SHAPES)
def test_the_tokenizer_gets_every_special_token_of_the_prompts(name):
    config = composed(f"+experiment={name}")
    template = config["chat_template"]
    named = {template["image_token"], *template["special_tokens"], *template["content_tokens"]}
    assert named == set(config["new_tokens"])
    # The released checkpoints have <IMG_CONTEXT> at 151667, and Qwen2.5's tokenizer ends at 151664.
    assert 151665 + config["new_tokens"].index("<IMG_CONTEXT>") == 151667
    assert 151665 + len(config["new_tokens"]) <= config["llm"]["vocab_size"]  # in the padding rows of its tables
