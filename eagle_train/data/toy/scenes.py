"""Pictures of shapes and of bar charts: what is in them, how they are drawn, what can be asked."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from eagle_train.data.toy.draw import BACKGROUNDS, INKS, SHAPES, Box, Canvas, contrast, jitter, random_size

NUMBERS = ("zero", "one", "two", "three", "four", "five")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
SIDES = ("left", "right", "top", "bottom")

Side = Literal["left", "right", "top", "bottom"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One thing to ask about a picture."""

    type: str
    """What the evaluation counts it under, for example `ink_colour`."""
    wordings: tuple[str, ...]
    """Ways to ask it. They tell nothing about the answers to other questions."""
    answer: str
    """One or two words, lower case, no full stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapesScene:
    """One to four equal shapes; a single shape lies wholly in one half of the picture."""

    shape: str
    ink: str
    background: str
    count: int
    side: str | None
    """The half that holds a single shape; None for several shapes."""


def random_shapes(
    rng: random.Random,
    *,
    shape: str | None = None,
    ink: str | None = None,
    background: str | None = None,
    count: int | None = None,
    side: str | None = None,
) -> ShapesScene:
    """Returns a scene whose unnamed properties are uniform; naming a `side` makes it a single shape.

    Only the count is not: every second scene holds a single shape, since only those have a half to learn.
    """
    count = 1 if side else count or rng.choice((1, 1, 1, 2, 3, 4))
    return ShapesScene(
        shape=shape or rng.choice(SHAPES),
        ink=ink or rng.choice(tuple(INKS)),
        background=background or rng.choice(tuple(BACKGROUNDS)),
        count=count,
        side=side or (rng.choice(SIDES) if count == 1 else None),
    )


def draw_shapes(scene: ShapesScene, rng: random.Random) -> Image.Image:
    """Returns a picture of the scene with sizes, places and shades drawn from `rng`."""
    # A half is one of the long side, which fills the square that models pad to: left stays left there.
    wide = scene.side in ("left", "right") if scene.side else rng.random() < 0.5
    size = random_size(rng, wide=wide)
    cells = [half_box(size, scene.side)] if scene.side else grid_boxes(size, scene.count, rng)
    canvas = Canvas(size, jitter(BACKGROUNDS[scene.background], rng))
    ink = jitter(INKS[scene.ink], rng)
    left, top, right, bottom = cells[0]
    radius = rng.uniform(0.38, 0.47) * min(right - left, bottom - top)
    for left, top, right, bottom in cells:
        centre = rng.uniform(left + radius, right - radius), rng.uniform(top + radius, bottom - radius)
        canvas.shape(scene.shape, centre, radius, ink)
    return canvas.image()


def half_box(size: tuple[int, int], side: str) -> Box:
    """Returns one half of a picture in pixels, less a strip of 4 % along the middle."""
    width, height = size
    match side:
        case "left":
            return (0, 0, 0.46 * width, height)
        case "right":
            return (0.54 * width, 0, width, height)
        case "top":
            return (0, 0, width, 0.46 * height)
        case "bottom":
            return (0, 0.54 * height, width, height)
    raise ValueError(f"no half {side!r}; there are {SIDES}")


def grid_boxes(size: tuple[int, int], count: int, rng: random.Random) -> list[Box]:
    """Returns `count` cells of the grid (one row, one column or 2 x 2) that has the largest cells.

    Cells leave 2 pixels free on every side, so that shapes at their borders do not touch.
    """
    width, height = size
    grids = [(1, count), (count, 1), (2, 2)]
    large_enough = [(rows, cols) for rows, cols in grids if rows * cols >= count]
    rows, cols = max(large_enough, key=lambda grid: min(height / grid[0], width / grid[1]))
    w, h = width / cols, height / rows
    boxes = [(c * w + 2, r * h + 2, (c + 1) * w - 2, (r + 1) * h - 2) for r in range(rows) for c in range(cols)]
    return rng.sample(boxes, count)


def shapes_questions(scene: ShapesScene) -> tuple[Question, ...]:
    """Returns what can be asked about a picture of shapes."""
    questions = (
        ink_question(scene.ink),
        background_question(scene.background),
        Question(
            type="count",
            wordings=("How many shapes are there?", "Count the shapes.", "What is the number of shapes?"),
            answer=NUMBERS[scene.count],
        ),
        Question(
            type="shape",
            wordings=("Which kind of shape is drawn?", "Name the kind of shape.", "What shape is used?"),
            answer=scene.shape,
        ),
    )
    return (*questions, half_question(scene.side)) if scene.side else questions


def ink_question(ink: str) -> Question:
    """Returns the question for the colour of what is drawn, whatever that is."""
    wordings = ("What is the ink colour?", "Which colour is drawn with?", "Name the colour of the ink.")
    return Question(type="ink_colour", wordings=wordings, answer=ink)


def background_question(background: str) -> Question:
    """Returns the question for the colour of the background."""
    wordings = ("What colour is the background?", "Name the background colour.", "Which colour lies behind?")
    return Question(type="background_colour", wordings=wordings, answer=background)


def half_question(side: str) -> Question:
    """Returns the question for the half that holds a single shape; it offers all four, so chance is a quarter."""
    wordings = (
        "Which half is the shape in, left, right, top or bottom?",
        "Is the shape in the left, right, top or bottom half?",
    )
    return Question(type="half", wordings=wordings, answer=side)


def shapes_caption(scene: ShapesScene) -> str:
    """Returns for example `three red circles on a white background`, with the half that holds a single one."""
    plural = "crosses" if scene.shape == "cross" else f"{scene.shape}s"
    noun = scene.shape if scene.count == 1 else plural
    place = f", in the {scene.side} half" if scene.side else ""
    return f"{NUMBERS[scene.count]} {scene.ink} {noun} on a {scene.background} background{place}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BarsScene:
    """A bar chart with one bar that is clearly the tallest."""

    num_bars: int
    tallest: int
    """Index of the tallest bar, from the left."""
    ink: str
    background: str


def random_bars(rng: random.Random, *, num_bars: int | None = None, tallest: int | None = None) -> BarsScene:
    """Returns a chart of 2 to 5 bars; what is not named is drawn uniformly among what goes with the rest."""
    num_bars = num_bars or rng.randint(max(2, (tallest or 0) + 1), len(ORDINALS))
    return BarsScene(
        num_bars=num_bars,
        tallest=rng.randrange(num_bars) if tallest is None else tallest,
        ink=rng.choice(tuple(INKS)),
        background=rng.choice(tuple(BACKGROUNDS)),
    )


def draw_bars(scene: BarsScene, rng: random.Random) -> Image.Image:
    """Returns a picture of the chart with sizes, heights and shades drawn from `rng`."""
    width, height = random_size(rng, wide=True, max_aspect=1.6)
    background = jitter(BACKGROUNDS[scene.background], rng)
    canvas = Canvas((width, height), background)
    ink = jitter(INKS[scene.ink], rng)
    base, tallest = 0.92 * height, rng.uniform(0.72, 0.86) * height
    pitch = 0.94 * width / scene.num_bars
    bar = rng.uniform(0.55, 0.7) * pitch
    for index in range(scene.num_bars):
        length = tallest if index == scene.tallest else rng.uniform(0.25, 0.68) * tallest
        left = 0.03 * width + index * pitch + (pitch - bar) / 2
        canvas.rectangle((left, base - length, left + bar, base), ink)
    canvas.rectangle((0.02 * width, base, 0.98 * width, base + 3), contrast(background))
    return canvas.image()


def bars_questions(scene: BarsScene) -> tuple[Question, ...]:
    """Returns what can be asked about a bar chart."""
    return (
        Question(
            type="num_bars",
            wordings=("How many bars are there?", "Count the bars.", "What is the number of bars?"),
            answer=NUMBERS[scene.num_bars],
        ),
        Question(
            type="tallest_bar",
            wordings=("Which bar is the tallest?", "Which bar is the highest, from the left?"),
            answer=ORDINALS[scene.tallest],
        ),
        Question(
            type="bar_colour",
            wordings=("What colour are the bars?", "Name the colour of the bars."),
            answer=scene.ink,
        ),
        background_question(scene.background),
    )


def bars_caption(scene: BarsScene) -> str:
    """Returns for example `a chart with four red bars on a white background, the second is the tallest`."""
    return (
        f"a chart with {NUMBERS[scene.num_bars]} {scene.ink} bars on a {scene.background} background, "
        f"the {ORDINALS[scene.tallest]} is the tallest"
    )
