"""Automatic Degrade Sampling: deterministic, monotone, fair, within its budget, and to the token what is encoded."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eagle_train.data.answers import AnswerCounter, first_answers
from eagle_train.data.chat import ChatTemplate
from eagle_train.data.degrade import AutomaticDegradeSampling, EachByItself, asked, frame_order, image_plans
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader
from eagle_train.data.layout import Layout, lay_out
from eagle_train.data.loss_weights import per_token
from eagle_train.data.media_costs import rounded
from eagle_train.data.media_text import MediaText
from eagle_train.data.number_costs import NumberCosts
from eagle_train.data.tile_grids import ClosestAspectRatio, ImageAreaPreservation
from eagle_train.data.tiling import PadToSquare
from eagle_train.data.too_long import DropTooLong, KeepTurns
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.config import build, load_choice
from eagle_train.types import Media, MediaPlan, Message, Sample, SampleError

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>", "<box>", "</box>"]
SPECIAL += ["<quad>", "</quad>", "<ref>", "</ref>", "<interval>", "</interval>"]
LABELS = "".join(f"Frame {i} sampled at {i / 2:.2f} seconds: The first video of 3.50 seconds\n" for i in range(200))
TEMPLATES = ("eagle2", "eagle2_5", "eagle2_5_training", "chatml")


@cache
def tokenizer_of(digits: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose digits are tokens of their own, or one that knows whole numbers."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits == "apart" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([LABELS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@cache
def template_of(name: str) -> ChatTemplate:
    return build(load_choice("chat_template", name))


class Erratic(PadToSquare):
    """A tiling that may choose fewer tiles under a higher limit."""

    def plan(self, width: int, height: int, max_tiles: int | None = None) -> MediaPlan:
        limit = max_tiles or 12
        return MediaPlan(rows=1, cols=1 + (7 * width + 5 * height) % limit)


TILINGS = (ImageAreaPreservation(tile_size=8), ClosestAspectRatio(tile_size=8), PadToSquare(), Erratic())
ADS = AutomaticDegradeSampling(frames=FrameRate(fps=2.0, min_frames=3, max_frames=40))


@cache
def encoder_of(template: str, digits: str, tiling: int, tokens_per_tile: int) -> Encoder:
    return Encoder(
        template=template_of(template),
        tokenizer=tokenizer_of(digits),
        images=ImageReader(),
        videos=PyAvVideo(),
        tiling=TILINGS[tiling],
        degrade=ADS,
        tile_size=1,
        tokens_per_tile=tokens_per_tile,
        loss_weight=per_token,
    )


encoders = st.builds(
    encoder_of,
    st.sampled_from(TEMPLATES),
    st.sampled_from(["apart", "mixed"]),
    st.sampled_from(range(len(TILINGS))),
    st.sampled_from([1, 4, 16, 256]),
)
pictures = st.builds(Media, kind=st.just("image"), width=st.integers(1, 60), height=st.integers(1, 60))
videos = st.builds(
    Media,
    kind=st.just("video"),
    duration=st.one_of(st.just(0.0), st.floats(0.02, 30.0), st.sampled_from([4.0, 9.995, 12.5, 1e4])),
    num_frames=st.integers(1, 400),
    fps=st.sampled_from([0.0, 0.0, 0.5, 4.0]),
    nframes=st.sampled_from([0, 0, 0, 5, 24]),
    min_frames=st.sampled_from([0, 0, 0, 6]),
    max_frames=st.sampled_from([0, 0, 0, 9]),
)
documents = st.builds(Media, kind=st.just("document"), num_frames=st.integers(1, 30))
samples_media = st.lists(st.one_of(pictures, videos, documents), max_size=5)
budgets = st.integers(-20, 6000)


def tiles_of(media, plans):
    return [plan.rows * plan.cols + plan.thumbnail for medium, plan in zip(media, plans, strict=True)]


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(encoders, samples_media, budgets, budgets)
def test_more_budget_never_gives_fewer_frames_or_tiles(encoder, media, one, other):
    small, large = (encoder.plan_media(media, budget)[0] for budget in sorted([one, other]))
    assert all(a.num_frames <= b.num_frames for a, b in zip(small, large, strict=True))
    assert all(a <= b for a, b in zip(tiles_of(media, small), tiles_of(media, large), strict=True))
    assert encoder.plan_media(media, sorted([one, other])[0])[0] == small, "nothing is remembered"
    unlimited = encoder.plan_media(media)[0]
    assert all(a.num_frames <= b.num_frames for a, b in zip(large, unlimited, strict=True))


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(encoders, samples_media, budgets)
def test_the_choice_is_the_largest_that_fits_and_never_more(encoder, media, budget):
    """Against every allocation in the order of `frame_order`, and every limit on tiles, each counted by itself."""
    asking = encoder.candidates(media)

    def tokens(plans):
        return sum(each.tokens(plan) for each, plan in zip(asking, plans, strict=True))

    moving = [place for place, medium in enumerate(media) if medium.kind != "image"]
    least = [ADS.least(media[place]) for place in moving]
    most = [asked(media[place], ADS.frames) for place in moving]
    stills = {place: image_plans(each, ADS.tile_caps) for place, each in enumerate(asking) if each.tiles}

    def allocation(added, level):
        counts = np.bincount(order[:added], minlength=len(moving)) + least if moving else []
        plans = {place: MediaPlan(num_frames=int(count)) for place, count in zip(moving, counts, strict=True)}
        plans |= {place: levels[level][0] for place, levels in stills.items()}
        return tuple(plans[place] for place in range(len(media)))

    order = frame_order(least, most)
    choices = [allocation(added, 0) for added in range(len(order) + 1)]
    choices += [allocation(len(order), level) for level in range(1, len(ADS.tile_caps))]
    fitting = [choice for choice in choices if tokens(choice) <= budget]
    plans, num_tokens = encoder.plan_media(media, budget)
    assert plans == (fitting[-1] if fitting else choices[0])
    assert num_tokens == tokens(plans) and (num_tokens <= budget or not fitting)
    for medium, plan in zip(media, plans, strict=True):
        assert plan.num_frames == 1 if medium.kind == "image" else plan.num_frames >= ADS.least(medium)
        assert plan.num_frames <= max(1, medium.num_frames)


@settings(deadline=None, max_examples=100)
@given(encoders, videos, st.integers(2, 4), budgets)
def test_equal_videos_differ_by_one_frame_at_most(encoder, video, copies, budget):
    plans, _ = encoder.plan_media([video] * copies, budget)
    counts = [plan.num_frames for plan in plans]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), max_size=4))
def test_all_media_get_the_same_part_of_what_they_ask_for(bounds):
    least, most = [low for low, _ in bounds], [low + more for low, more in bounds]
    order = frame_order(least, most)
    counts = list(least)
    for place in order.tolist():
        shares = [count / high for count, high in zip(counts, most, strict=True)]
        open_ = [share for share, count, high in zip(shares, counts, most, strict=True) if count < high]
        assert shares[place] == min(open_), "the one that is furthest behind"
        counts[place] += 1
    assert counts == most


@given(pictures, st.sampled_from(TILINGS), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_a_higher_limit_never_gives_an_image_fewer_tokens(image, tiling, caps):
    (candidate,) = replace(encoder_of("eagle2", "apart", 0, 16), tiling=tiling).candidates([image])
    plans = image_plans(candidate, caps)
    assert len(plans) == len(set(caps))
    assert [tokens for _, tokens in plans] == sorted(tokens for _, tokens in plans)
    for (plan, tokens), cap in zip(plans, sorted(set(caps)), strict=True):
        assert plan.rows * plan.cols <= cap and tokens == candidate.tokens(plan)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(encoders, videos | documents, st.integers(1, 60))
def test_bounds_hold_for_all_fewer_frames(encoder, medium, num_frames):
    num_frames = min(num_frames, medium.num_frames)
    (candidate,) = encoder.candidates([medium])
    bounds = candidate.at_least(MediaPlan(num_frames=num_frames))
    assert len(bounds) == num_frames + 1 and (np.diff(bounds) > 0).all()
    for count in range(1, num_frames + 1):
        assert bounds[count] <= candidate.tokens(MediaPlan(num_frames=count))


@pytest.mark.slow
@given(st.lists(st.floats(0, 1e5) | st.sampled_from([0.125, 2.675, 9.995, 0.005, 1.005, 99.995]), min_size=1))
@pytest.mark.parametrize("decimals", [0, 1, 2, 3])
def test_rounding_is_that_of_formatting(decimals, values):
    digits = [int(f"{value:.{decimals}f}".replace(".", "")) for value in values]
    assert rounded(np.array(values), decimals).tolist() == digits


words = st.sampled_from(["a", "Two cats\n", " ", "\nwhat?", "12", "été", "<|im_end|>", "<IMG_CONTEXT>", "<box>"])
texts = st.lists(words, min_size=1, max_size=5).map("".join)


@st.composite
def conversations(draw):
    """Returns a sample of up to three questions with media anywhere in them."""
    messages, media = [], []
    for _ in range(draw(st.integers(1, 3))):
        content = []
        for medium in draw(st.lists(st.one_of(pictures, videos, documents, st.none()), max_size=3)):
            if medium is not None:
                content.append(len(media))
                media.append(medium)
            content.append(draw(texts))
        messages.append(Message(role="user", content=tuple(content or ["?"])))
        messages.append(Message(role="assistant", content=("b" + draw(texts),)))
    return Sample(key="k", source="s", messages=tuple(messages), media=tuple(media))


@settings(deadline=None, max_examples=150)
@given(encoders, conversations(), st.integers(20, 4000), st.sampled_from([DropTooLong(), KeepTurns()]))
def test_planned_tokens_are_encoded_tokens(encoder, sample, max_length, too_long):
    (text,) = AnswerCounter(encoder.template, encoder.tokenizer).tokenize([sample.messages])
    layout = Layout(encoder=encoder, max_length=max_length, too_long=too_long, text=None, fingerprint="")
    least = text.ends[-1].num_tokens + encoder.plan_media(sample.media, 0)[1]
    try:
        planned = lay_out("k", text.ends, sample.media, layout)
    except SampleError as error:
        assert error.reason == "too_long" and least > max_length
        assert f"{least} tokens" in error.detail and f"a row has {max_length};" in error.detail
        return
    assert (planned.lost_turns > 0) == (least > max_length)
    kept = first_answers(sample, planned.num_answers)
    encoded = encoder.encode(kept, planned.media, encoder.new_tiles(planned.media))
    assert len(encoded.input_ids) == planned.num_tokens <= max_length
    if not planned.lost_turns:
        stored = encoder.encode(replace(sample, messages=()), planned.media, encoded.pixels.numpy(), text.tokens)
        assert all(getattr(stored, name).equal(getattr(encoded, name)) for name in ("input_ids", "labels"))
    assert len(encoded.pixels) == planned.num_tiles
    assert int((encoded.loss_weights > 0).sum()) == planned.num_targets > 0
    shown = [plan.num_frames for plan, medium in zip(planned.media, kept.media, strict=True) if medium.kind != "image"]
    assert planned.num_frames == sum(shown)


def test_both_ways_of_counting_are_tested():
    assert NumberCosts(tokenizer_of("apart")).apart and not NumberCosts(tokenizer_of("mixed")).apart


def test_each_by_itself_ignores_the_budget():
    encoder = replace(encoder_of("chatml", "apart", 0, 16), degrade=EachByItself(frames=FrameRate(max_frames=4)))
    media = [
        Media(kind="image", width=60, height=40),
        Media(kind="video", duration=9.0, num_frames=90),
        Media(kind="document", num_frames=7),
        Media(kind="video", num_frames=3),
    ]
    plans, _ = encoder.plan_media(media, 0)
    assert plans == encoder.plan_media(media)[0]
    assert plans == (TILINGS[0].plan(60, 40), *(MediaPlan(num_frames=count) for count in (4, 7, 3)))


def test_the_worked_example():
    """Frames come before tiles; tiles take what the frames leave."""
    template = ChatTemplate(prefix={}, suffix={}, media=MediaText(frame="Frame {number}: "))
    encoder = replace(encoder_of("chatml", "apart", 0, 256), template=template)
    media = [Media(kind="image", width=16, height=8), Media(kind="video", duration=5.0, num_frames=100)]
    label = len(tokenizer_of("apart").encode("Frame 1: "))
    full = 10 * (256 + label) + 1  # frame 10 has one more digit
    plans = {
        budget: encoder.plan_media(media, budget)[0]
        for budget in (0, 256 + 3 * (256 + label), 255 + full, 256 + full, 3 * 256 + full)
    }
    image, grid = MediaPlan(), MediaPlan(rows=1, cols=2, thumbnail=True)
    found = [(chosen[0], chosen[1].num_frames) for chosen in plans.values()]
    assert found == [(image, 3), (image, 3), (image, 9), (image, 10), (grid, 10)]


def test_settings_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        AutomaticDegradeSampling(frames=FrameRate(), tile_caps=(2, 0))
    with pytest.raises(ValueError, match="must be at least 1"):
        AutomaticDegradeSampling(frames=FrameRate(), tile_caps=())
