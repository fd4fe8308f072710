"""Conversations about several pictures, each of a single shape."""

from __future__ import annotations

import random

from eagle_train.data.toy.conversations import Attachment, Conversation, Turn
from eagle_train.data.toy.draw import INKS, SHAPES
from eagle_train.data.toy.scenes import ORDINALS, SIDES, ShapesScene, draw_shapes, random_shapes
from eagle_train.data.toy.splits import Split, image_in_split


def which_image(split: Split, rng: random.Random, *, target: int | None = None) -> Conversation:
    """Returns `Image 1: <image> Image 2: <image> ... Which image has a red shape?`.

    Args:
        split: split that the pictures belong to.
        rng: source of all chance.
        target: index in 0..2 of the picture asked for; without it there are two or three pictures, any of
            them is asked for, and in half of the conversations a second question follows.
    """
    num_images = rng.randint(max(2, (target or 0) + 1), 3)
    inks, shapes = rng.sample(tuple(INKS), num_images), rng.sample(SHAPES, num_images)
    scenes = [
        random_shapes(rng, ink=ink, shape=shape, side=rng.choice(SIDES))
        for ink, shape in zip(inks, shapes, strict=True)
    ]
    asked = rng.sample((inks, shapes), 1 if target is not None or rng.random() < 0.5 else 2)
    turns = []
    for values in asked:
        index = rng.randrange(num_images) if target is None else target
        noun = f"{values[index]} shape" if values is inks else values[index]
        wording = rng.choice((f"Which image has a {noun}?", f"In which image is there a {noun}?"))
        turns.append(Turn(question=(wording,), answer=ORDINALS[index]))
    opening: list[str | int] = []
    for index in range(num_images):
        opening += [f"Image {index + 1}: " if index == 0 else f" Image {index + 1}: ", index]
    turns[0] = Turn(question=(*opening, f" {turns[0].question[0]}"), answer=turns[0].answer)
    return Conversation(turns=tuple(turns), media=tuple(_picture(scene, split, rng) for scene in scenes))


def second_image_later(split: Split, rng: random.Random) -> Conversation:
    """Returns a conversation whose second picture comes in its second turn; the third turn compares both."""
    scenes = random_shapes(rng, side=rng.choice(SIDES)), random_shapes(rng, side=rng.choice(SIDES))
    by_ink = rng.random() < 0.5
    answers = [scene.ink if by_ink else scene.shape for scene in scenes]
    first, second = (
        ("What is the ink colour?", "And what is the ink colour in this image?")
        if by_ink
        else ("Which kind of shape is drawn?", "And which kind of shape is drawn in this image?")
    )
    look_back = rng.randrange(2)
    name = "ink colour" if by_ink else "shape"
    third = f"What was the {name} in the {ORDINALS[look_back]} image?"
    turns = (
        Turn(question=(0, first), answer=answers[0]),
        Turn(question=(1, second), answer=answers[1]),
        Turn(question=(third,), answer=answers[look_back]),
    )
    return Conversation(turns=turns, media=tuple(_picture(scene, split, rng) for scene in scenes))


def _picture(scene: ShapesScene, split: Split, rng: random.Random) -> Attachment:
    """Returns a picture of the scene that belongs to the split."""
    return Attachment(kind="image", data=image_in_split(split, lambda: draw_shapes(scene, rng)))
