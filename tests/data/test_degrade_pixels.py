"""Fewer frames, then fewer pixels: deterministic, monotone, the most that fits, and to the token what is encoded."""

import copy
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_train.data.answers import AnswerCounter, first_answers
from eagle_train.data.degrade import AutomaticDegradeSampling, EachByItself, asked
from eagle_train.data.degrade_pixels import FramesThenPixels
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import EvenFrameRate, FrameRate
from eagle_train.data.images import ImageReader
from eagle_train.data.layout import Layout, lay_out
from eagle_train.data.loss_weights import per_token
from eagle_train.data.positions import multimodal_rotary
from eagle_train.data.smart_resize import SmartResize
from eagle_train.data.tokenizer.added import add_special_tokens
from eagle_train.data.too_long import DropTooLong, KeepTurns
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.config import build, load_choice
from eagle_train.types import Media, Message, Sample, SampleError
from tests.data.test_degrade import tokenizer_of

POLICY = FramesThenPixels(
    frames=EvenFrameRate(fps=2.0, min_frames=3, max_frames=40), min_pages=2, tile_caps=(64, 32, 16, 9, 4, 1)
)
TILING = SmartResize(
    tile_size=4, min_pixels=32, max_pixels=6400, video_min_pixels=64, video_max_pixels=1600, video_total_pixels=30_000
)


@cache
def encoder_of(template: str, degrade=POLICY) -> Encoder:
    known = build(load_choice("chat_template", template))
    tokenizer = copy.deepcopy(tokenizer_of("apart"))
    add_special_tokens(tokenizer, known.missing_tokens(tokenizer))
    return Encoder(
        template=known,
        tokenizer=tokenizer,
        images=ImageReader(),
        videos=PyAvVideo(),
        tiling=TILING,
        degrade=degrade,
        tile_size=4,
        tokens_per_tile=1,
        loss_weight=per_token,
        positions=multimodal_rotary,
    )


sides = st.integers(4, 300)
pixels = st.sampled_from([0, 0, 160, 1600])
pictures = st.builds(Media, kind=st.just("image"), width=sides, height=sides, max_pixels=pixels)
number_or_none = st.sampled_from([0, 0, 1, 2, 3, 7, 24])
videos = st.builds(
    Media,
    kind=st.just("video"),
    width=sides,
    height=sides,
    duration=st.sampled_from([0.0, 0.02, 4.0, 9.995, 12.5, 1e4]),
    num_frames=st.integers(1, 400),
    max_pixels=pixels,
    total_pixels=st.sampled_from([0, 0, 2000, 10**6]),
    resized_width=pixels.map(lambda n: n // 16),
    resized_height=st.just(40),
    fps=st.sampled_from([0.0, 0.0, 0.3, 5.0]),
    nframes=number_or_none,
    min_frames=number_or_none,
    max_frames=number_or_none,
)
documents = st.builds(Media, kind=st.just("document"), width=sides, height=sides, num_frames=st.integers(1, 12))
samples_media = st.lists(st.one_of(pictures, videos, documents), max_size=4)
encoders = st.sampled_from(["qwen2_vl", "qwen2_vl_ids"]).map(encoder_of)
budgets = st.integers(-20, 4000)


def grid_of(plan):
    return plan.rows * plan.cols


@settings(deadline=None, max_examples=100)
@given(encoders, samples_media, budgets, budgets)
def test_more_budget_never_gives_fewer_frames_or_pixels(encoder, media, one, other):
    (small, small_tokens), (large, large_tokens) = (
        encoder.plan_media(media, budget) for budget in sorted([one, other])
    )
    assert small_tokens <= large_tokens
    assert all(a.num_frames <= b.num_frames and grid_of(a) <= grid_of(b) for a, b in zip(small, large, strict=True))
    assert encoder.plan_media(media, min(one, other))[0] == small, "nothing is remembered"


@settings(deadline=None, max_examples=100)
@given(encoders, samples_media, budgets)
def test_frames_go_before_pixels_and_no_more_than_must(encoder, media, budget):
    asking, full = encoder.candidates(media), encoder.plan_media(media)[0]
    plans, tokens = encoder.plan_media(media, budget)
    least, least_tokens = encoder.plan_media(media, -(10**9))
    assert tokens <= budget or plans == least
    moving = [n for n, medium in enumerate(media) if medium.kind != "image"]
    shrunk = any(grid_of(a) < grid_of(b) for a, b in zip(plans, full, strict=True))
    if shrunk:
        assert all(plans[n].num_frames == least[n].num_frames for n in moving)
        return
    if plans == full or least_tokens > budget:
        return
    # One more step of the video or document that is next would be too much.
    assert any(plans[n].num_steps < full[n].num_steps for n in moving)
    shares = {n: plans[n].num_steps / full[n].num_steps for n in moving if plans[n].num_steps < full[n].num_steps}
    nearest = min(shares, key=lambda n: (shares[n], n))
    more = min((plans[nearest].num_steps + 1) * full[nearest].frames_per_tile, full[nearest].num_frames)
    grown = [*plans[:nearest], replace(plans[nearest], num_frames=more), *plans[nearest + 1 :]]
    assert sum(each.tokens(plan) for each, plan in zip(asking, grown, strict=True)) > budget


@settings(deadline=None, max_examples=100)
@given(encoders, samples_media, budgets)
def test_what_records_ask_for_bounds_every_plan(encoder, media, budget):
    plans, _ = encoder.plan_media(media, budget)
    for medium, plan in zip(media, plans, strict=True):
        if medium.kind == "video":
            assert plan.num_frames <= POLICY.frames.of(medium).max_frames
            assert plan.num_frames >= min(medium.min_frames, asked(medium, POLICY.frames))
        if medium.max_pixels and not medium.resized_width:
            assert grid_of(plan) * 4**2 <= medium.max_pixels or min(plan.rows, plan.cols) == 1


@st.composite
def conversations(draw):
    media = draw(samples_media)
    content = tuple(part for n in range(len(media)) for part in (n, draw(st.sampled_from(["", "a b", "7"]))))
    turns = [Message(role="user", content=(*content, "?")), Message(role="assistant", content=("yes 12",))]
    turns += [Message(role="user", content=("why?",)), Message(role="assistant", content=("so",))]
    return Sample(key="k", source="s", messages=tuple(turns), media=tuple(media))


@settings(deadline=None, max_examples=100)
@given(encoders, conversations(), st.integers(60, 3000), st.sampled_from([DropTooLong(), KeepTurns()]))
def test_planned_tokens_are_encoded_tokens(encoder, sample, max_length, too_long):
    (text,) = AnswerCounter(encoder.template, encoder.tokenizer).tokenize([sample.messages])
    layout = Layout(encoder=encoder, max_length=max_length, too_long=too_long, text=None, fingerprint="")
    try:
        planned = lay_out("k", text.ends, sample.media, layout)
    except SampleError as error:
        assert error.reason == "too_long"
        return
    kept = first_answers(sample, planned.num_answers)
    encoded = encoder.encode(kept, planned.media, encoder.new_tiles(planned.media))
    assert len(encoded.input_ids) == planned.num_tokens <= max_length
    assert len(encoded.pixels) == planned.num_tiles == len(encoded.image_positions)
    assert int((encoded.loss_weights > 0).sum()) == planned.num_targets > 0
    assert sum(t * h * w for t, h, w in encoded.grids) == planned.num_tiles
    assert sum(t * (h * w) ** 2 for t, h, w in encoded.grids) == planned.num_tile_pairs
    positions = encoder.positions(len(encoded.input_ids), encoded.image_positions.numpy(), encoded.grids)
    assert positions.shape == (4, planned.num_tokens)


def test_what_eagles_policy_makes_of_native_resolution_fits_too():
    ads = AutomaticDegradeSampling(frames=FrameRate(fps=2.0, min_frames=2, max_frames=40), tile_caps=(64, 16, 4))
    encoder = encoder_of("qwen2_vl", ads)
    media = [
        Media(kind="image", width=90, height=90),
        Media(kind="video", width=80, height=60, duration=12.0, num_frames=300),
    ]
    counts = []
    for budget in (100, 200, 400, 900, 4000):
        plans, tokens = encoder.plan_media(media, budget)
        assert tokens <= budget
        counts.append((plans[1].num_frames, plans[0].num_tiles))
    assert counts == sorted(counts) and counts[0][0] < counts[-1][0] == 24


def test_each_by_itself_gives_what_is_asked():
    encoder = encoder_of("qwen2_vl", EachByItself(frames=EvenFrameRate(max_frames=8)))
    video = Media(kind="video", width=80, height=60, duration=30.0, num_frames=900)
    plans, _ = encoder.plan_media([video], 10)
    assert plans[0].num_frames == 8 and plans[0].num_steps == 4 and grid_of(plans[0]) > 80


def test_labels_between_frames_that_share_tiles_are_refused():
    with pytest.raises(ValueError, match=r"media\.whole_video=true"):
        replace(encoder_of("qwen2_vl"), template=build(load_choice("chat_template", "eagle2")))
    with pytest.raises(ValueError, match="must be at least 1"):
        FramesThenPixels(frames=EvenFrameRate(), tile_caps=())
