"""What a toy picture shows, measured in its pixels, is what its scene says."""

import io
import random
from itertools import pairwise

import av
import numpy as np
import pytest

from eagle_train.data.toy.clips import FRAMES_PER_SECOND, draw_clip, random_change, random_move
from eagle_train.data.toy.draw import BACKGROUNDS, INKS, SHAPES, Canvas, luma, outline, papers
from eagle_train.data.toy.pages import (
    FIELD_VALUES,
    TITLES,
    document_questions,
    draw_document,
    draw_print,
    random_document,
    random_number,
    random_word,
)
from eagle_train.data.toy.scenes import (
    SIDES,
    bars_caption,
    bars_questions,
    draw_bars,
    draw_shapes,
    random_bars,
    random_shapes,
    shapes_caption,
    shapes_questions,
)
from eagle_train.data.toy.video import mp4_bytes

COLOURS = {**INKS, **BACKGROUNDS}
SEEDS = range(40)


def nearest_colours(image):
    """Returns the name of the nearest table colour of every pixel, (H, W)."""
    pixels = np.asarray(image, dtype=np.int32)
    table = np.array(list(COLOURS.values()))
    distance = ((pixels[:, :, None] - table) ** 2).sum(-1)
    return np.array(list(COLOURS))[distance.argmin(-1)]


def num_regions(mask):
    """Returns the number of 4-connected regions of at least 20 pixels in a boolean (H, W) mask."""
    left, count = {tuple(point) for point in np.argwhere(mask)}, 0
    while left:
        stack, size = [left.pop()], 0
        while stack:
            y, x = stack.pop()
            size += 1
            around = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= around
            stack += around
        count += size >= 20
    return count


@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_have_their_colours_and_number(seed):
    rng = random.Random(seed)
    scene = random_shapes(rng)
    names = nearest_colours(draw_shapes(scene, rng))
    ink = names == scene.ink
    assert (names == scene.background).sum() + ink.sum() > 0.93 * names.size
    assert num_regions(ink) == scene.count
    assert ink.sum() > scene.count * 120


@pytest.mark.parametrize("side", SIDES)
def test_a_single_shape_lies_wholly_in_its_half(side):
    for seed in range(10):
        rng = random.Random(seed)
        scene = random_shapes(rng, side=side)
        ink = nearest_colours(draw_shapes(scene, rng)) == scene.ink
        ys, xs = np.nonzero(ink)
        height, width = ink.shape
        extent = {"left": xs.max() < width / 2, "right": xs.min() >= width / 2}
        extent |= {"top": ys.max() < height / 2, "bottom": ys.min() >= height / 2}
        assert extent[side] and scene.count == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_bars_have_their_number_and_one_is_clearly_the_tallest(seed):
    rng = random.Random(seed)
    scene = random_bars(rng)
    ink = nearest_colours(draw_bars(scene, rng)) == scene.ink
    filled = np.concatenate([[0], ink.sum(0) > 3, [0]])
    starts, stops = np.nonzero(np.diff(filled) == 1)[0], np.nonzero(np.diff(filled) == -1)[0]
    heights = [np.median(ink[:, a:b].sum(0)) for a, b in zip(starts, stops, strict=True)]
    assert len(heights) == scene.num_bars
    assert int(np.argmax(heights)) == scene.tallest
    assert sorted(heights)[-2] < 0.75 * max(heights)


def test_shapes_have_different_outlines():
    areas = []
    for shape in SHAPES:
        canvas = Canvas((64, 64), (0, 0, 0))
        canvas.shape(shape, (32, 32), 30, (255, 255, 255))
        areas.append(np.asarray(canvas.image())[:, :, 0].mean())
    assert all(b - a > 5 for a, b in pairwise(sorted(areas)))
    with pytest.raises(ValueError, match="no outline for shape 'circle'"):
        outline("circle")


def test_print_fills_its_picture_and_stays_inside():
    for seed in SEEDS:
        rng = random.Random(seed)
        scene = random_number(rng) if seed % 2 else random_word(rng)
        names = nearest_colours(draw_print(scene, rng))
        inside = names == scene.ink
        ys, xs = np.nonzero(inside)
        height, width = inside.shape
        assert max(np.ptp(xs) / width, np.ptp(ys) / height) > 0.55
        edges = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
        assert edges.mean() < 0.02
        assert abs(luma(INKS[scene.ink]) - luma(BACKGROUNDS[scene.background])) > 65


def test_every_ink_has_paper_that_suits_it():
    assert all(len(papers(ink)) >= 2 for ink in INKS)


def test_documents_print_every_line_and_ask_for_each():
    for seed in SEEDS:
        rng = random.Random(seed)
        scene = random_document(rng)
        image = np.asarray(draw_document(scene, rng).convert("L"))
        rows = np.concatenate([[0], (image < 110).any(1), [0]])
        assert (np.diff(rows) == 1).sum() >= len(scene.fields) + 1
        assert (image[:, -1] > 150).all() and (image[-1] > 150).all()
        asked = {question.wordings[0]: question.answer for question in document_questions(scene)}
        assert asked == {f"What is the {name}?": value for name, value in (*scene.fields, ("title", scene.title))}


def test_a_document_holds_what_was_named():
    for seed in SEEDS:
        for field in FIELD_VALUES:
            value = FIELD_VALUES[field][seed % len(FIELD_VALUES[field])]
            assert (field, value) in random_document(random.Random(seed), field=field, value=value).fields
        assert random_document(random.Random(seed), field="title", value=TITLES[0]).title == TITLES[0]


def decoded(data):
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def main_ink(image):
    names, counts = np.unique(nearest_colours(image), return_counts=True)
    return max((count, name) for name, count in zip(names, counts, strict=True) if name in INKS)[1]


def test_a_changing_clip_starts_and_ends_in_its_colours():
    for seed in range(12):
        rng = random.Random(seed)
        scene = random_change(rng)
        frames = decoded(mp4_bytes(draw_clip(scene, rng), frames_per_second=FRAMES_PER_SECOND))
        assert (main_ink(frames[0]), main_ink(frames[-1])) == (scene.first, scene.last)
        assert scene.first != scene.last


def test_a_moving_clip_moves_as_it_says():
    for seed in range(12):
        rng = random.Random(seed)
        scene = random_move(rng)
        frames = decoded(mp4_bytes(draw_clip(scene, rng), frames_per_second=FRAMES_PER_SECOND))
        x = [np.nonzero(nearest_colours(frame) == scene.first)[1].mean() for frame in frames]
        steps = np.diff(x)
        assert (steps > 0).all() if scene.motion == "right" else (steps < 0).all()
        assert abs(x[-1] - x[0]) > 0.25 * frames[0].width


def test_mp4_bytes_repeat_and_refuse_odd_sizes():
    rng = random.Random(0)
    frames = draw_clip(random_move(rng), rng)
    assert mp4_bytes(frames, frames_per_second=8) == mp4_bytes(frames, frames_per_second=8)
    with pytest.raises(ValueError, match=r"one even size, not \[\(63, 64\)\]"):
        mp4_bytes([frames[0].resize((63, 64))], frames_per_second=8)
    with pytest.raises(ValueError, match="one even size"):
        mp4_bytes([], frames_per_second=8)


def test_captions_name_everything():
    rng = random.Random(0)
    scene = random_shapes(rng, shape="cross", ink="red", background="white", count=3)
    assert shapes_caption(scene) == "three red crosses on a white background"
    single = random_shapes(rng, shape="star", ink="blue", background="black", side="left")
    assert shapes_caption(single) == "one blue star on a black background, in the left half"
    bars = random_bars(rng, num_bars=4, tallest=1)
    assert bars_caption(bars) == (
        f"a chart with four {bars.ink} bars on a {bars.background} background, the second is the tallest"
    )


def test_questions_tell_nothing_about_other_answers():
    """Texts are the same for every scene; that there is a half to ask for shows that there is one shape."""
    rng = random.Random(0)
    shapes = [shapes_questions(random_shapes(rng)) for _ in range(50)]
    bars = [bars_questions(random_bars(rng)) for _ in range(50)]
    assert len({tuple(q.wordings for q in asked if q.type != "half") for asked in shapes}) == 1
    assert len({tuple(q.wordings for q in asked) for asked in bars}) == 1
