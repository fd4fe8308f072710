"""Longer clips whose questions need the right frames: colours one after another, moves, and flashes.

There is a frame per second, so that all times are whole seconds, as the frame labels of the toy's template tell them.
Whatever is asked about holds for at least two of them: fewer frames show what fewer frames cost.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from eagle_train.data.toy.draw import BACKGROUNDS, INKS, Canvas, jitter
from eagle_train.data.toy.scenes import Question

FRAMES_PER_SECOND = 1
SIDES = (40, 64)
"""Shortest and longest side of a frame, pixels."""
TYPES = ("first_colour", "colour_at", "direction", "flashes")
"""What is asked of held-out clips."""
NUM_OPTIONS = {"first_colour": 2, "direction": 2}
"""How many answers a question itself names: guessing one of them is chance."""
PAPERS = ("white", "black", "grey")
"""Backgrounds: no colour of a disc is near them."""

Motion = Literal["left", "right"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Colours:
    """A disc that takes one colour after another, each for as long."""

    inks: tuple[str, ...]
    """Different ones, in order."""
    seconds: int
    """Of each colour."""

    @property
    def duration(self) -> int:
        """Seconds of the clip."""
        return len(self.inks) * self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A disc that crosses the picture."""

    ink: str
    motion: Motion
    duration: int
    """Seconds of the clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flashes:
    """A dark lamp that lights up for two seconds now and then."""

    ink: str
    starts: tuple[int, ...]
    """Seconds at which it lights up, at least four apart."""
    duration: int
    """Seconds of the clip; it begins and ends dark."""


Timeline = Colours | Move | Flashes


def random_timeline(rng: random.Random) -> Timeline:
    """Returns a clip of a random kind."""
    return rng.choice((random_colours, random_colours, random_move, random_flashes))(rng)


def random_colours(rng: random.Random, *, first: str | None = None, num_colours: int | None = None) -> Colours:
    """Returns two to four colours of two or four seconds each; `first` is drawn uniformly if not named."""
    first = first or rng.choice(tuple(INKS))
    others = rng.sample([ink for ink in INKS if ink != first], (num_colours or rng.randint(2, 4)) - 1)
    return Colours(inks=(first, *others), seconds=rng.choice((2, 2, 4)))


def random_move(rng: random.Random, *, motion: Motion | None = None) -> Move:
    """Returns a move of 3 to 8 seconds, left or right at random if not named."""
    return Move(ink=rng.choice(tuple(INKS)), motion=motion or rng.choice(("left", "right")), duration=rng.randint(3, 8))


def random_flashes(rng: random.Random, *, count: int | None = None) -> Flashes:
    """Returns one to four flashes with at least two dark seconds around each.

    How long the clip is, 18 to 24 seconds, tells nothing about their number.
    """
    count, duration = count or rng.randint(1, 4), rng.randint(18, 24)
    spare = duration - 4 * count - 2  # seconds; 2 lit and 2 dark ones per flash, and 2 dark ones before them all
    before = sorted(rng.randint(0, spare) for _ in range(count))
    starts = tuple(2 + 4 * number + extra for number, extra in enumerate(before))
    return Flashes(ink=rng.choice(tuple(INKS)), starts=starts, duration=duration)


def heldout_question(question_type: str, ordinal: int, rng: random.Random) -> tuple[Timeline, Question]:
    """Returns a clip and a question of one of `TYPES` about it; answers take turns by `ordinal`."""
    match question_type:
        case "direction":
            scene: Timeline = random_move(rng, motion=("left", "right")[ordinal % 2])
        case "flashes":
            scene = random_flashes(rng, count=ordinal % 4 + 1)
        case _:
            scene = random_colours(rng, first=tuple(INKS)[ordinal % len(INKS)])
    return scene, next(q for q in timeline_questions(scene, rng) if q.type == question_type)


def draw_timeline(scene: Timeline, rng: random.Random) -> list[Image.Image]:
    """Returns the frames, `FRAMES_PER_SECOND` for each second, all of one even size."""
    size = width, height = 2 * rng.randint(SIDES[0] // 2, SIDES[1] // 2), 2 * rng.randint(SIDES[0] // 2, SIDES[1] // 2)
    paper = jitter(BACKGROUNDS[rng.choice(PAPERS)], rng)
    inks = {name: jitter(colour, rng) for name, colour in INKS.items()}
    radius = rng.uniform(*((0.25, 0.3) if isinstance(scene, Move) else (0.36, 0.46))) * min(size)
    x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    num_frames = scene.duration * FRAMES_PER_SECOND
    frames = []
    for number in range(num_frames):
        second = number / FRAMES_PER_SECOND
        match scene:
            case Colours():
                colour = inks[scene.inks[int(second // scene.seconds)]]
            case Move():
                progress = number / (num_frames - 1)
                way = progress if scene.motion == "right" else 1 - progress
                x, colour = radius + (width - 2 * radius) * way, inks[scene.ink]
            case Flashes():
                lit = any(start <= second < start + 2 for start in scene.starts)
                colour = inks[scene.ink] if lit else (60, 60, 60)
        canvas = Canvas(size, paper)
        canvas.shape("circle", (x, y), radius, colour)
        frames.append(canvas.image())
    return frames


def timeline_questions(scene: Timeline, rng: random.Random) -> tuple[Question, ...]:
    """Returns what can be asked about a clip; those of `TYPES` first."""
    match scene:
        case Colours():
            return _colour_questions(scene, rng)
        case Move():
            moves = ("Does the disc move left or right?", "Which way does the disc move, left or right?")
            colour = ("What colour is the disc?", "Name the colour of the disc.")
            return (
                Question(type="direction", wordings=moves, answer=scene.motion),
                Question(type="disc_colour", wordings=colour, answer=scene.ink),
            )
        case Flashes():
            times = ", ".join(f"at {start}s" for start in scene.starts)
            return (
                Question(
                    type="flashes",
                    wordings=("How many flashes are there?", "How often does the lamp light up?"),
                    answer=str(len(scene.starts)),
                ),
                Question(type="timeline", wordings=("When does the lamp light up?",), answer=times),
            )


def _colour_questions(scene: Colours, rng: random.Random) -> tuple[Question, ...]:
    earlier, later = sorted(rng.sample(range(len(scene.inks)), 2))
    pair = [scene.inks[earlier], scene.inks[later]]
    either = " or ".join(rng.sample(pair, 2))
    place = rng.randrange(len(scene.inks))
    second = place * scene.seconds + scene.seconds // 2
    parts = [f"{i * scene.seconds + scene.seconds // 2}s {ink}" for i, ink in enumerate(scene.inks)]
    return (
        Question(type="first_colour", wordings=(f"Which colour came first, {either}?",), answer=pair[0]),
        Question(
            type="colour_at",
            wordings=(f"What colour is the disc at {second}s?", f"Name the colour at {second}s."),
            answer=scene.inks[place],
        ),
        Question(type="timeline", wordings=("List the colours in order.",), answer=", ".join(parts)),
    )
