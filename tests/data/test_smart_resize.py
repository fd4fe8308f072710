"""Pictures of native resolution: sizes as published, exact patches, wishes of records."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

from eagle_train.data.frames import EvenFrameRate
from eagle_train.data.media import MediaError
from eagle_train.data.smart_resize import SmartResize, smart_resize
from eagle_train.model.encoders.qwen2_vit import Qwen2Vit
from eagle_train.types import Media, MediaPlan

BOUNDS = st.sampled_from([(3136, 12_845_056), (784, 50_176), (200_704, 1_003_520), (56 * 56, 28 * 28 * 1280)])
VIDEO = Media(kind="video", duration=10.0, num_frames=240)


@settings(max_examples=500)
@given(st.integers(15, 4000), st.integers(15, 4000), BOUNDS)  # at 14, half a tile, it rounds to 0
def test_sizes_are_those_of_transformers(width, height, bounds):
    if max(width, height) > 200 * min(width, height):
        return
    rows, cols = theirs(height, width, 28, *bounds)
    assert smart_resize(width, height, tile=28, min_pixels=bounds[0], max_pixels=bounds[1]) == (cols // 28, rows // 28)


@settings(max_examples=500)
@given(st.integers(1, 4000), st.integers(1, 4000), BOUNDS)
def test_bounds_are_kept_but_by_strips(width, height, bounds):
    least, most = bounds
    if max(width, height) > 200 * min(width, height):
        return
    cols, rows = smart_resize(width, height, tile=28, min_pixels=least, max_pixels=most)
    assert min(cols, rows) >= 1 and cols * rows * 784 >= min(least, 784 * 2)
    assert cols * rows * 784 <= most or min(cols, rows) == 1


@pytest.mark.parametrize(
    ("size", "bounds", "wanted"),
    [
        ((800, 600), (3136, 12_845_056), (29, 21)),  # 609 tokens
        ((42, 70), (784, 12_845_056), (2, 2)),  # 1.5 and 2.5 tiles: halves to the even number
        ((3900, 20), (784, 50_176), (111, 1)),  # qwen-vl-utils gives a side of 0
        ((20, 3900), (784, 50_176), (1, 111)),
        ((5, 900), (784, 50_176), (1, 32)),  # transformers rounds 5 px to 0 first and gives (1, 32) too
        ((13, 26), (3136, 12_845_056), (2, 3)),
        ((1, 1), (784, 50_176), (1, 1)),
    ],
)
def test_corners(size, bounds, wanted):
    assert smart_resize(*size, tile=28, min_pixels=bounds[0], max_pixels=bounds[1]) == wanted


def test_a_strip_of_more_than_200_is_refused():
    smart_resize(200, 1, tile=28, min_pixels=784, max_pixels=50_176)
    with pytest.raises(MediaError, match="201 x 1 pixels"):
        smart_resize(201, 1, tile=28, min_pixels=784, max_pixels=50_176)


@example(1, 1, [2, 3])  # the fewest pixels would be scaled up to 2 x 2 tiles
@given(st.integers(1, 3000), st.integers(1, 3000), st.lists(st.integers(1, 3000), min_size=2))
def test_a_higher_limit_on_tiles_is_never_above_it_but_by_strips(width, height, limits):
    if max(width, height) > 200 * min(width, height):
        return
    for limit in limits:
        plan = SmartResize().plan(width, height, limit)
        assert plan.num_tiles <= limit or min(plan.rows, plan.cols) == 1


def test_records_may_ask_for_bounds_or_a_size():
    tiling = SmartResize()
    assert tiling.plan(800, 600).num_tiles == 609
    assert tiling.of(Media(kind="image", max_pixels=50_176)).plan(800, 600) == MediaPlan(rows=6, cols=9)
    assert tiling.of(Media(kind="image", min_pixels=1_003_520)).plan(80, 60).num_tiles >= 1280
    asked = tiling.of(Media(kind="image", resized_width=280, resized_height=400))
    for half in (Media(kind="image", resized_width=280), Media(kind="image", resized_height=400)):
        assert tiling.of(half).plan(640, 480) == tiling.plan(640, 480), "one side alone asks for nothing"
    assert asked.plan(800, 600) == MediaPlan(rows=14, cols=10)
    assert asked.plan(800, 600, max_tiles=35).num_tiles <= 35


def test_frames_share_the_pixels_of_a_video():
    tiling = SmartResize()
    few, many = (tiling.plan_frames(VIDEO, (1920, 1080), n) for n in (8, 768))
    assert (few.num_steps, few.frames_per_tile, few.num_tiles) == (4, 2, 4 * few.rows * few.cols)
    assert 700 < few.rows * few.cols <= 768  # bounded by the frame
    assert 270 < many.rows * many.cols <= 300  # by the video: 115,200 tokens for 384 steps
    assert tiling.plan_frames(VIDEO, (64, 64), 8).rows ** 2 >= 128
    capped = tiling.plan_frames(Media(kind="video", max_pixels=100_352), (1920, 1080), 8)
    assert capped.rows * capped.cols <= 128
    shared = tiling.plan_frames(Media(kind="video", total_pixels=8 * 28**2 * 100), (1920, 1080), 16)
    assert 64 < shared.rows * shared.cols <= 134, "what 16 frames have of the total is less than the least with 5 %"
    raised = tiling.plan_frames(Media(kind="video", min_pixels=600 * 784, total_pixels=784), (100, 100), 8)
    assert raised.rows * raised.cols >= 600, "the least of a frame comes before what all have"
    given = tiling.plan_frames(Media(kind="video", resized_width=140, resized_height=84), (1920, 1080), 8)
    assert (given.cols, given.rows) == (5, 3), "a size is what is asked for, be it small for a frame"
    pages = tiling.plan_frames(Media(kind="document", num_frames=5), (800, 600), 5)
    assert (pages.num_steps, pages.num_tiles) == (5, 5 * 609)


@pytest.mark.parametrize(
    ("duration", "available", "wanted"),
    [(10.0, 240, 20), (10.4, 240, 20), (0.5, 30, 4), (0.5, 3, 2), (0.1, 1, 1), (1e4, 10**6, 768), (9.4, 19, 18)],
)
def test_frames_are_even_as_in_qwen_vl_utils(duration, available, wanted):
    assert EvenFrameRate().num_frames(duration, available) == wanted


def photo(width, height, seed=0):
    """Returns a picture of noise on a ramp."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + rng.integers(0, 55, (height, width, 3))
    return Image.fromarray(ramp.astype(np.uint8))


def test_patches_are_those_of_the_published_processor():
    image, tiling = photo(150, 90), SmartResize(min_pixels=784, max_pixels=100 * 784)
    plan = tiling.plan(*image.size)
    tiles = np.zeros((plan.num_tiles, 3, 2, 28, 28), np.uint8)
    tiling.cut(image, plan, tiles)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 100 * 784})
    wanted = processor(images=[image], return_tensors="pt")
    assert wanted["image_grid_thw"].tolist() == [[1, 2 * plan.rows, 2 * plan.cols]]
    vit = Qwen2Vit(hidden_size=8, num_hidden_layers=0, num_attention_heads=2)
    torch.testing.assert_close(
        vit.normalize(torch.from_numpy(tiles), 28).flatten(1), wanted["pixel_values"], atol=1e-6, rtol=0
    )


def test_frames_fill_tiles_two_by_two_and_the_last_is_doubled():
    tiling = SmartResize(tile_size=8, min_pixels=64, video_min_pixels=64)
    frames = [Image.new("RGB", (16, 8), (10 * n, n, 0)) for n in range(5)]
    plan = MediaPlan(num_frames=5, rows=1, cols=2, frames_per_tile=2)
    tiles = np.zeros((plan.num_tiles, 3, 2, 8, 8), np.uint8)
    tiling.cut_all(frames, plan, tiles)
    assert plan.num_tiles == 6 and tiles[:, 1, :, 0, 0].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 4], [4, 4]]
    assert tiling.grids(plan, 1) == ((3, 1, 2),)
    pages = MediaPlan(num_frames=2, rows=1, cols=2)
    tiling.cut_all(frames[:2], pages, tiles[:4])
    assert tiles[:4, 1, :, 0, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert tiling.grids(pages, 2) == ((1, 1, 2), (1, 1, 2))


def test_views_are_the_resized_pictures():
    image, tiling = photo(40, 24), SmartResize(tile_size=8, min_pixels=64)
    plan = tiling.plan(40, 24)
    tiles = np.zeros((plan.num_tiles, 3, 2, 8, 8), np.uint8)
    tiling.cut(image, plan, tiles)
    (view,) = tiling.views(tiles, plan)
    assert (view.transpose(1, 2, 0) == np.asarray(image)).all()


def test_impossible_bounds_are_refused():
    with pytest.raises(ValueError, match="min_pixels 10000 and max_pixels 1000"):
        SmartResize(min_pixels=10_000, max_pixels=1_000)
    with pytest.raises(ValueError, match="bicubicc"):
        SmartResize(resample="bicubicc")
    with pytest.raises(ValueError, match="out is"):
        SmartResize().cut(photo(28, 28), MediaPlan(), np.zeros((1, 3, 28, 28), np.uint8))
    with pytest.raises(ValueError, match="choose no frames"):
        EvenFrameRate(min_frames=3, max_frames=3)
