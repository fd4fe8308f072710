"""Print: single numbers and words, and small documents."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from PIL import Image

from eagle_train.data.toy.draw import BACKGROUNDS, INKS, Canvas, jitter, papers, random_size
from eagle_train.data.toy.scenes import Question, background_question, ink_question

WORDS = (
    *("cat", "dog", "sun", "cow", "bus", "hat", "fish", "tree", "milk", "book"),
    *("ship", "rain", "door", "lamp", "king", "frog", "cake", "ring", "snow", "moon"),
)
FIELD_VALUES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "total": tuple(str(value) for value in range(10, 100)),
        "name": ("anna", "ben", "carl", "dora", "emil", "fay"),
        "day": ("mon", "tue", "thu", "sun"),
        "item": ("bread", "tea", "soup", "apple", "rice", "jam"),
    }
)
"""Fields of a document and what may stand in them."""
TITLES = ("receipt", "invoice", "ticket", "order")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrintScene:
    """One number or one word in large print."""

    type: Literal["digit", "number", "word"]
    text: str
    ink: str
    background: str


def random_number(rng: random.Random, *, digit: int | None = None) -> PrintScene:
    """Returns a digit, named or drawn uniformly, or (half the time when none is named) a number in 10..99."""
    if digit is None and rng.random() < 0.5:
        return _random_print(rng, "number", str(rng.randint(10, 99)))
    return _random_print(rng, "digit", str(rng.randint(0, 9) if digit is None else digit))


def random_word(rng: random.Random, *, word: str | None = None) -> PrintScene:
    """Returns a word, named or drawn uniformly from `WORDS`."""
    return _random_print(rng, "word", word or rng.choice(WORDS))


def _random_print(rng: random.Random, type: Literal["digit", "number", "word"], text: str) -> PrintScene:
    """Returns the print of `text` in a random colour on paper that suits it."""
    ink = rng.choice(tuple(INKS))
    return PrintScene(type=type, text=text, ink=ink, background=rng.choice(papers(ink)))


def draw_print(scene: PrintScene, rng: random.Random) -> Image.Image:
    """Returns a picture of the print with its size, place and shades drawn from `rng`."""
    width, height = random_size(rng, wide=True)
    if scene.type == "digit":
        width = height
    canvas = Canvas((width, height), jitter(BACKGROUNDS[scene.background], rng))
    scale = rng.uniform(0.8, 0.94)
    # A digit is narrower than the square it is printed on, so it starts farther to the right.
    left = (rng.uniform(0.15, 0.3) if scene.type == "digit" else rng.uniform(0.03, 0.97 - scale)) * width
    top = rng.uniform(0.0, 1.0 - scale) * height
    box = (left, top, left + scale * width, top + scale * height)
    canvas.text(scene.text, box, jitter(INKS[scene.ink], rng))
    return canvas.image()


def print_questions(scene: PrintScene) -> tuple[Question, ...]:
    """Returns what can be asked about a single number or word."""
    match scene.type:
        case "digit":
            wordings = ("Which digit is shown?", "Read the digit.")
        case "number":
            wordings = ("Which number is shown?", "Read the number.")
        case "word":
            wordings = ("Which word is shown?", "Read the word.")
    question = Question(type=scene.type, wordings=wordings, answer=scene.text)
    return question, ink_question(scene.ink), background_question(scene.background)


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentScene:
    """A title and two or three lines `Field: value`."""

    title: str
    fields: tuple[tuple[str, str], ...]
    """(field, value) from the top down."""


def random_document(rng: random.Random, *, field: str | None = None, value: str | None = None) -> DocumentScene:
    """Returns a document with the named field and value, if any, among uniformly drawn ones.

    Args:
        field: one of `FIELD_VALUES`, or `title`.
        value: what stands there.
    """
    names = rng.sample(tuple(FIELD_VALUES), rng.randint(2, 3))
    if field in FIELD_VALUES and field not in names:
        names[rng.randrange(len(names))] = field
    values = {name: rng.choice(FIELD_VALUES[name]) for name in names}
    if field in values and value is not None:
        values[field] = value
    title = value if field == "title" and value else rng.choice(TITLES)
    return DocumentScene(title=title, fields=tuple((name, values[name]) for name in names))


def draw_document(scene: DocumentScene, rng: random.Random) -> Image.Image:
    """Returns a picture of the document: dark print on light paper, one line under the other."""
    width = rng.randint(144, 160)
    line = rng.randint(30, 34)
    height = line * (1 + len(scene.fields)) + 12
    paper = rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255)
    ink = rng.randint(0, 40), rng.randint(0, 40), rng.randint(0, 40)
    canvas = Canvas((width, height), paper)
    left = rng.uniform(4, 8)
    lines = [scene.title.upper(), *(f"{name.capitalize()}: {value}" for name, value in scene.fields)]
    for index, text in enumerate(lines):
        top = 4 + index * line
        canvas.text(text, (left, top + 1, width - 4, top + line - 1), ink)
    canvas.rectangle((left, 4 + line, width - left, 6 + line), ink)
    return canvas.image()


def document_questions(scene: DocumentScene) -> tuple[Question, ...]:
    """Returns one question for each field of a document, and one for its title."""
    facts = (*scene.fields, ("title", scene.title))
    return tuple(
        Question(
            type="document",
            wordings=(f"What is the {name}?", f"Read the {name}.", f"Which {name} is given?"),
            answer=value,
        )
        for name, value in facts
    )
