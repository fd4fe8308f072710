"""InternVL2 as configured: its size, its tokens, its tiles, its prompts, its stages."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, PreTrainedTokenizerFast

from eagle_train.data.chat import TextRun
from eagle_train.data.degrade import Candidate, SharedTiles
from eagle_train.data.frames import FrameRate
from eagle_train.data.tile_grids import ClosestAspectRatio
from eagle_train.data.tokenizer.added import add_special_tokens, num_written
from eagle_train.model.llm import llm_config
from eagle_train.model.long_rope import SampleLongRope
from eagle_train.model.lora import is_adapter
from eagle_train.train.assemble import adapters, add_adapters, build_schedule, meta_model
from eagle_train.train.config import build, load_choice
from eagle_train.train.optim import freeze, freeze_table
from eagle_train.types import Media, MediaPlan, Message
from tests.configs import composed

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)


def special_tokens():
    return composed("+experiment=internvl2-1b")["new_tokens"]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_1b_has_exactly_the_published_parameters():
    model = meta_model(composed("+experiment=internvl2-1b"))
    assert count(model) == 938_158_976
    assert count(model.mixture) == 304_012_288 and count(model.projector) == 4_482_816
    assert count(model.llm.model) == 493_780_992 and count(model.llm.lm_head) == 135_882_880
    assert model.mixture.tokens_per_tile == 256
    assert not model.llm.config.tie_word_embeddings and model.llm.config.vocab_size == 151655


PUBLISHED = {"internlm2_1_8b": (1_889_110_016, 92544), "internlm2_5_7b": (7_737_708_544, 92544)}
PUBLISHED["phi3_mini_128k"] = (3_821_079_552, 32064)
"""Parameters of the LLMs by themselves, and rows of their tables."""
LARGER = [
    ("internvl2-2b", "internlm2_1_8b", 92544, 2_205_754_368),
    ("internvl2-4b", "phi3_mini_128k", 32011, 4_146_855_936),
    ("internvl2-8b", "internlm2_5_7b", 92544, 8_075_365_376),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "llm", "num_tokens", "total"), LARGER)
def test_larger_ones_are_their_published_parts(name, llm, num_tokens, total):
    """InternViT, the MLP, and an LLM with rows for its tokenizer's tokens and the nine new ones, untied."""
    config = composed(f"+experiment={name}")
    model = meta_model(config)
    width, (published, rows) = model.llm.config.hidden_size, PUBLISHED[llm]
    assert config["llm"]["vocab_size"] == num_tokens + len(special_tokens())
    assert count(model.mixture) == 304_012_288
    assert count(model.projector) == 2 * 4096 + (4096 + 1) * width + (width + 1) * width
    assert count(model.llm) == published + 2 * (num_tokens + 9 - rows) * width
    assert count(model) == total and not model.llm.config.tie_word_embeddings


def test_phi3_has_its_published_rotary_embedding():
    """48 pairs of channels, short factors up to 4096 tokens, scaled for a context 32 times that."""
    fields = dict(load_choice("llm", "phi3_mini_128k"))
    kind, pretrained, _ = (fields.pop(name) for name in ("model_type", "pretrained", "_target_"))
    rotary = SampleLongRope(llm_config(kind, pretrained, fields))
    for name, channels in (("short_factor", rotary.short), ("long_factor", rotary.long)):
        factors = fields["rope_parameters"][name]
        assert len(factors) == len(channels) == 48 and factors == sorted(factors)
    assert rotary.original_length == 4096 and rotary.scale == pytest.approx((1 + 5 / 12) ** 0.5)


def qwen_like(num_base):
    """A byte-level tokenizer whose base has as many tokens as Qwen2's, 151646, or any other number."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    vocab |= {f"unused{i}": i for i in range(len(alphabet), num_base - 3)}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    add_special_tokens(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def test_special_tokens_get_the_published_ids():
    tokenizer = qwen_like(151646)
    special = special_tokens()
    assert add_special_tokens(tokenizer, special) == 9
    assert tokenizer.convert_tokens_to_ids(special) == list(range(151646, 151655))
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == 151648
    assert len(tokenizer) == num_written(tokenizer, str(load_choice("chat_template", "hermes2"))) == 151655
    add_special_tokens(tokenizer, ["<video>"])  # of transformers' processor, which no sequence holds
    assert num_written(tokenizer, str(load_choice("chat_template", "hermes2"))) == 151655


TURNS = [
    Message(role="user", content=(0, "\nWhat <box>is</box> it?")),
    Message(role="assistant", content=("A cat.",)),
    Message(role="user", content=("Sure?",)),
    Message(role="assistant", content=("Yes",)),
]


@pytest.mark.parametrize(
    ("name", "system", "newline"),
    [("hermes2", SYSTEM, ""), ("internlm2", SYSTEM, ""), ("internvl2_5", SYSTEM_2_5, "\n")],
    ids=["hermes2", "internlm2", "internvl2_5"],
)
def test_prompts_and_labels_are_the_published_ones(name, system, newline):
    template, tokenizer = build(load_choice("chat_template", name)), qwen_like(400)
    add_special_tokens(tokenizer, special_tokens())
    items = template.encode(TURNS, tokenizer)
    runs = [item for item in items if isinstance(item, TextRun)]
    assert [item for item in items if isinstance(item, int)] == [0]
    text = "".join(tokenizer.decode(run.ids) for run in runs)
    assert text == (
        f"<|im_start|>system\n{system}<|im_end|>{newline}<|im_start|>user\n\nWhat <box>is</box> it?<|im_end|>{newline}"
        f"<|im_start|>assistant\nA cat.<|im_end|>{newline}<|im_start|>user\nSure?<|im_end|>{newline}"
        f"<|im_start|>assistant\nYes<|im_end|>{newline}"
    )
    learnt = "".join(tokenizer.decode(run.ids[run.is_target]) for run in runs)
    assert learnt == "A cat.<|im_end|>Yes<|im_end|>"
    asked = template.encode_prompt(TURNS[:1], tokenizer)
    assert tokenizer.decode(asked[-1].ids).endswith("it?<|im_end|>" + newline + "<|im_start|>assistant\n")
    assert set(template.stop_ids(tokenizer)) == set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))


PHI3_TOKENS = ["</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@pytest.mark.parametrize("swallows", [True, False])
def test_phi3s_prompts_and_labels_are_the_published_ones(swallows):
    """Its tokens swallow what spaces and newlines follow them, where its tokenizer says so; the labels are the same."""
    template, tokenizer = build(load_choice("chat_template", "phi3_chat")), qwen_like(400)
    added = [AddedToken(token, rstrip=swallows, special=True, normalized=False) for token in PHI3_TOKENS]
    tokenizer.add_tokens(added, special_tokens=True)
    add_special_tokens(tokenizer, special_tokens())
    turns = [*TURNS[:3], Message(role="assistant", content=("  Yes",))]
    runs = [item for item in template.encode(turns, tokenizer) if isinstance(item, TextRun)]
    newline, spaces = ("", "") if swallows else ("\n", "\n  ")
    assert "".join(tokenizer.decode(run.ids) for run in runs) == (
        f"<|system|>{newline}{SYSTEM}<|end|><|user|>{newline}\nWhat <box>is</box> it?<|end|><|assistant|>{newline}"
        f"A cat.<|end|><|user|>{newline}Sure?<|end|><|assistant|>{spaces}Yes<|end|>"
    )
    learnt = "".join(tokenizer.decode(run.ids[run.is_target]) for run in runs)
    assert learnt == f"A cat.<|end|>{spaces.removeprefix(newline)}Yes<|end|>"
    assert template.stop_ids(tokenizer) == sorted(
        tokenizer.convert_tokens_to_ids(["</s>", "<|endoftext|>", "<|end|>", "<|im_end|>"])  # the last: as end of text
    )


@pytest.mark.parametrize(("name", "kept"), [("hermes2", " Why? \n"), ("internlm2", "Why?")])
def test_internlm2s_turns_are_stripped(name, kept):
    template = build(load_choice("chat_template", name))
    (run,) = template.render([Message(role="user", content=(" Why? \n",))])
    assert "".join(text for text, _ in run).endswith(f"user\n{kept}<|im_end|>")


def test_a_medium_is_followed_by_one_newline_whether_or_not_the_record_has_it():
    template = build(load_choice("chat_template", "hermes2"))
    with_it, without = (template.render([Message(role="user", content=(0, text))]) for text in ("\nWhy?", "Why?"))
    joined = [
        ["".join(text for text, _ in item) for item in items if not isinstance(item, int)]
        for items in (with_it, without)
    ]
    assert joined[0] == joined[1] and joined[0][1].startswith("\nWhy?")


def image(width, height):
    tiling = ClosestAspectRatio(tile_size=448, max_tiles=12)
    return Candidate(
        medium=Media(kind="image", width=width, height=height),
        tiles=partial(tiling.plan, width, height),
        frames=None,
        tokens=lambda plan: plan.num_tiles * 256,
    )


def test_images_of_a_sample_share_the_tiles_and_videos_have_one_per_frame():
    policy = build(composed("+experiment=internvl2-1b")["degrade"])
    assert policy == SharedTiles(max_tiles=12, frames=FrameRate(fps=1.0, min_frames=8, max_frames=32))
    large = image(4000, 3000)
    clip = Candidate(
        medium=Media(kind="video", duration=20.0, num_frames=500),
        tiles=None,
        frames=lambda number, **_: MediaPlan(num_frames=number),
        tokens=lambda plan: 256,
    )
    assert policy.plan([large], 1) == [MediaPlan(rows=3, cols=4, thumbnail=True)]
    for number, most in [(2, 6), (3, 4), (5, 2), (12, 1), (13, 1)]:
        plans = policy.plan([large] * number + [clip], 1)
        assert plans[:-1] == [large.tiles(max_tiles=most)] * number
        assert plans[0].rows * plans[0].cols <= most and plans[0].thumbnail == (plans[0].rows * plans[0].cols > 1)
        assert plans[-1] == MediaPlan(num_frames=20)
    assert policy.plan([], 1) == []
    with pytest.raises(ValueError, match="max_tiles 0"):
        SharedTiles(max_tiles=0, frames=policy.frames)


def stages(schedule, experiment="internvl2-1b"):
    config = composed(f"+experiment={experiment}", f"schedule={schedule}")
    return build_schedule(config)


@pytest.mark.slow
def test_stages_are_the_published_ones():
    everything = {"mixture": 4e-5, "projector": 4e-5, "llm": 4e-5}
    vit = {"mixture": 2e-5, "projector": 2e-5, "llm": None}
    expected = {
        "internvl2": {"pretrain": (vit, 4096, 100), "sft": (everything, 8192, None)},
        "internvl2_5": {
            "stage1": ({"mixture": None, "projector": 2e-4, "llm": None}, 16384, 100),
            "stage2": (everything, 16384, None),
        },
        "internvl2_finetune": {"finetune": ({"mixture": None, "projector": 4e-5, "llm": 4e-5}, 4096, None)},
    }
    made = {schedule: stages(schedule) for schedule in expected}
    for schedule, wanted in expected.items():
        found = made[schedule]
        assert found.keys() == wanted.keys()
        for name, (rates, length, warmup) in wanted.items():
            stage = found[name]
            assert (stage.learning_rates, stage.max_length, stage.warmup_steps) == (rates, length, warmup)
            assert (stage.weight_decay, tuple(stage.betas), stage.eps, stage.min_lr_ratio) == (
                0.01,
                (0.9, 0.999),
                1e-8,
                0.0,
            )
    assert made["internvl2_5"]["stage2"].num_steps == 22000
    finetune = made["internvl2_finetune"]["finetune"]
    assert finetune.degrade.max_tiles == 6 and finetune.rows_per_step == 128


def test_larger_models_have_a_stage_between_the_two():
    made = stages("internvl2_5_large", "internvl2-8b")
    assert list(made) == ["stage1", "stage1_5", "stage2"]
    assert {name: stage.learning_rates for name, stage in made.items()} == {
        "stage1": {"mixture": None, "projector": 2e-4, "llm": None},
        "stage1_5": {"mixture": 1e-5, "projector": 1e-5, "llm": None},
        "stage2": {"mixture": 4e-5, "projector": 4e-5, "llm": 4e-5},
    }
    assert [stage.rows_per_step for stage in made.values()] == [512, 1024, 512]
    assert [stage.warmup_steps for stage in made.values()] == [100, 100, None]
    assert {(stage.max_length, stage.weight_decay) for stage in made.values()} == {(16384, 0.05)}
    assert made["stage2"].num_steps == 5500


@pytest.mark.slow
def test_fine_tuning_by_adapters_is_the_published_one():
    config = composed("+experiment=internvl2-1b-lora")
    model, (stage,) = meta_model(config), build_schedule(config).values()
    with torch.device("meta"):
        add_adapters(config, model)
    adapted = adapters(config)
    freeze(model, stage.learning_rates, adapted)
    rows = freeze_table(model, stage.learning_rates, adapted)
    inputs_and_outputs = 2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864)  # q and o, k and v, the MLP
    trained = 24 * 16 * inputs_and_outputs
    assert sum(row.trainable for row in rows) == trained and sum(row.total for row in rows) == 938_158_976 + trained
    assert all(name.startswith("llm.") and is_adapter(name) for name, p in model.named_parameters() if p.requires_grad)
    assert list(adapted) == ["llm"]
    assert (adapted["llm"].rank, adapted["llm"].alpha, adapted["llm"].dropout) == (16, 32, 0.05)
    (full,) = stages("internvl2_finetune").values()
    assert replace(stage, learning_rates=full.learning_rates, rows_per_step=128) == full
    assert stage.learning_rates == {"mixture": None, "projector": None, "llm": 4e-5} and stage.rows_per_step == 16
    assert config["mixture"]["encoders"]["intern_vit"]["drop_path"] == 0.0


def test_drop_path_is_the_published_one():
    with torch.device("meta"):
        layers = build(composed("+experiment=internvl2-1b")["mixture"]["encoders"]["intern_vit"]).layers
    assert (layers[0].drop_path.drop_prob, layers[-1].drop_path.drop_prob) == (0.0, pytest.approx(0.1))
