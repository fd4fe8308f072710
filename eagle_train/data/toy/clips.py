"""Short clips: a disc that changes its colour half way, and a circle that moves across."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from eagle_train.data.toy.draw import BACKGROUNDS, INKS, Canvas, jitter
from eagle_train.data.toy.scenes import Question

FRAMES_PER_SECOND = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipScene:
    """A clip of one circle on a plain background."""

    first: str
    """Ink of the first half."""
    last: str
    """Ink of the second half; the same one in a clip that moves."""
    background: str
    motion: Literal["left", "right"] | None
    """Where the circle moves; None if it stays and changes its colour."""


def random_change(rng: random.Random, *, first: str | None = None) -> ClipScene:
    """Returns a clip that changes from `first` (drawn uniformly if not named) to another colour."""
    first = first or rng.choice(tuple(INKS))
    last = rng.choice([ink for ink in INKS if ink != first])
    return ClipScene(first=first, last=last, background=rng.choice(tuple(BACKGROUNDS)), motion=None)


def random_move(rng: random.Random, *, motion: Literal["left", "right"] | None = None) -> ClipScene:
    """Returns a clip of a circle that moves as named, or left or right at random."""
    ink = rng.choice(tuple(INKS))
    motion = motion or rng.choice(("left", "right"))
    return ClipScene(first=ink, last=ink, background=rng.choice(tuple(BACKGROUNDS)), motion=motion)


def draw_clip(scene: ClipScene, rng: random.Random) -> list[Image.Image]:
    """Returns the 8 to 16 frames (an even number) of the clip, of one even size of 64 to 96 pixels a side."""
    num_frames = 2 * rng.randint(4, 8)
    width, height = 2 * rng.randint(32, 48), 2 * rng.randint(32, 48)
    background = jitter(BACKGROUNDS[scene.background], rng)
    first = jitter(INKS[scene.first], rng)
    last = first if scene.last == scene.first else jitter(INKS[scene.last], rng)
    share = (0.4, 0.46) if scene.motion is None else (0.25, 0.3)
    radius = rng.uniform(*share) * min(width, height)
    y = rng.uniform(radius, height - radius)
    start, stop = radius, width - radius
    frames = []
    for index in range(num_frames):
        progress = index / (num_frames - 1)
        if scene.motion is None:
            x = width / 2
        else:
            x = start + (stop - start) * (progress if scene.motion == "right" else 1 - progress)
        canvas = Canvas((width, height), background)
        canvas.shape("circle", (x, y), radius, first if index < num_frames // 2 else last)
        frames.append(canvas.image())
    return frames


def clip_questions(scene: ClipScene) -> tuple[Question, ...]:
    """Returns what can be asked about a clip; the first question needs the order of the frames."""
    if scene.motion is None:
        wordings = {
            "first": ("Which colour came first?", "What was the colour at the start?"),
            "last": ("Which colour came last?", "What was the colour at the end?"),
        }
        return (
            Question(type="video", wordings=wordings["first"], answer=scene.first),
            Question(type="video", wordings=wordings["last"], answer=scene.last),
        )
    moves = ("Does the circle move left or right?", "Which way does the circle move, left or right?")
    colour = ("What colour is the circle?", "Name the colour of the circle.")
    return (
        Question(type="video", wordings=moves, answer=scene.motion),
        Question(type="ink_colour", wordings=colour, answer=scene.first),
    )
