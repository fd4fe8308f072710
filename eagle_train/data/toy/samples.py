"""Samples of the toy data set: conversations to train on, and single questions to be tested with.

Every sample is a function of (kind, split, index, seed), so each one can be made again alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from eagle_train.data.shards import TarSample
from eagle_train.data.toy import clips, pages, scenes, timelines
from eagle_train.data.toy.albums import second_image_later, which_image
from eagle_train.data.toy.conversations import (
    Attachment,
    Conversation,
    Turn,
    ask_about,
    canonical_record,
    shuffled,
)
from eagle_train.data.toy.draw import BACKGROUNDS, INKS, SHAPES
from eagle_train.data.toy.splits import SPLITS, Split, image_in_split, video_in_split
from eagle_train.data.toy.texts import random_text_turn

Scene = scenes.ShapesScene | scenes.BarsScene | pages.PrintScene | pages.DocumentScene | clips.ClipScene

KINDS = ("shapes", "bars", "captions", "digits", "words", "documents", "multi_image", "video", "timelines", "text")
"""Kinds of the train split."""


def question_types(kind: str) -> tuple[str, ...]:
    """Returns the question types that a held-out set of `kind` goes through; `all` names every type.

    Raises:
        ValueError: for a kind without test questions.
    """
    shapes, bars = ("ink_colour", "background_colour", "count", "half", "shape"), ("num_bars", "tallest_bar")
    match kind:
        case "all":
            return (*shapes, *bars, "digit", "word", "document", "multi_image", "video")
        case "shapes":
            return shapes
        case "bars":
            return bars
        case "digits" | "words" | "documents":
            return (kind.removesuffix("s"),)
        case "multi_image" | "video":
            return (kind,)
        case "timelines":
            return timelines.TYPES
    raise ValueError(f"no held-out questions for kind {kind!r}; use all or a kind with short answers")


def toy_samples(kind: str, split: str, num_samples: int, seed: int) -> Iterator[TarSample]:
    """Yields the first `num_samples` samples, see `toy_sample`."""
    for index in range(num_samples):
        yield toy_sample(kind, split, index, seed)


def toy_sample(kind: str, split: str, index: int, seed: int) -> TarSample:
    """Returns one sample; equal arguments give equal samples.

    Args:
        kind: one of `KINDS`; in the held-out split also `all`, and neither `captions` nor `text`.
        split: `train`: a conversation, whose `meta` is its kind; `heldout`: one question, whose `meta` is its
            type (and how many answers the question itself names, if it does). Types take turns, and so do the
            answers of a type. No picture is in both splits.
        index: number of the sample from 0.
        seed: of the whole set.

    Raises:
        ValueError: for an unknown kind or split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {SPLITS}")
    rng = random.Random(f"{seed}/{split}/{kind}/{index}")
    if split == "train":
        conversation, meta = train_conversation(kind, rng), {"kind": kind}
    else:
        types = question_types(kind)
        meta = {"type": types[index % len(types)]}
        if options := timelines.NUM_OPTIONS.get(meta["type"]):
            meta["num_options"] = options
        conversation = heldout_conversation(meta["type"], index // len(types), rng)
    return (f"{kind}-{split}-{index:06d}", *canonical_record(conversation, meta))


def train_conversation(kind: str, rng: random.Random) -> Conversation:
    """Returns a random conversation of one of `KINDS`.

    Raises:
        ValueError: for another kind.
    """
    match kind:
        case "shapes":
            return _talk(scenes.random_shapes(rng), rng, least=3)
        case "bars":
            return _talk(scenes.random_bars(rng), rng, least=3)
        case "captions":
            return _caption(scenes.random_shapes(rng) if rng.random() < 0.65 else scenes.random_bars(rng), rng)
        case "digits":
            return _talk(pages.random_number(rng), rng, least=3)
        case "words":
            return _talk(pages.random_word(rng), rng, least=3)
        case "documents":
            return _talk(pages.random_document(rng), rng, least=3)
        case "multi_image":
            return which_image("train", rng) if rng.random() < 0.7 else second_image_later("train", rng)
        case "video":
            return _talk(clips.random_change(rng) if rng.random() < 0.5 else clips.random_move(rng), rng, least=2)
        case "timelines":
            timeline = timelines.random_timeline(rng)
            questions = shuffled(timelines.timeline_questions(timeline, rng), rng, least=2)
            return ask_about(clip_of(timeline, "train", rng), questions, rng)
        case "text":
            pairs = [random_text_turn(rng) for _ in range(rng.randint(2, 4))]
            return Conversation(turns=tuple(Turn(question=(text,), answer=answer) for text, answer in pairs))
    raise ValueError(f"no train split of kind {kind!r}; the kinds are {KINDS}")


def heldout_conversation(question_type: str, ordinal: int, rng: random.Random) -> Conversation:
    """Returns a single question about held-out pictures.

    Args:
        question_type: one of `question_types("all")`.
        ordinal: number of the question among those of its type; the possible answers take turns.
        rng: source of everything else.
    """
    if question_type == "multi_image":
        return which_image("heldout", rng, target=ordinal % 3)
    if question_type in timelines.TYPES:
        timeline, question = timelines.heldout_question(question_type, ordinal, rng)
        return ask_about(clip_of(timeline, "heldout", rng), [question], rng)
    scene, answer = _scene_with_answer(question_type, ordinal, rng)
    question = next(q for q in questions_of(scene) if q.type == question_type and q.answer == answer)
    return ask_about(attachment_of(scene, "heldout", rng), [question], rng)


def _scene_with_answer(question_type: str, ordinal: int, rng: random.Random) -> tuple[Scene, str]:
    """Returns a scene and the answer to its question of the given type."""

    def turn(options: tuple[Any, ...]) -> Any:
        return options[ordinal % len(options)]

    match question_type:
        case "ink_colour":
            scene: Scene = scenes.random_shapes(rng, ink=turn(tuple(INKS)))
        case "background_colour":
            scene = scenes.random_shapes(rng, background=turn(tuple(BACKGROUNDS)))
        case "count":
            scene = scenes.random_shapes(rng, count=turn((1, 2, 3, 4)))
        case "half":
            scene = scenes.random_shapes(rng, side=turn(scenes.SIDES))
        case "shape":
            scene = scenes.random_shapes(rng, shape=turn(SHAPES))
        case "num_bars":
            scene = scenes.random_bars(rng, num_bars=turn((2, 3, 4, 5)))
        case "tallest_bar":
            scene = scenes.random_bars(rng, tallest=turn((0, 1, 2, 3, 4)))
        case "digit":
            scene = pages.random_number(rng, digit=turn(tuple(range(10))))
        case "word":
            scene = pages.random_word(rng, word=turn(pages.WORDS))
        case "document":
            field, values = turn((*pages.FIELD_VALUES.items(), ("title", pages.TITLES)))
            value = rng.choice(values)
            return pages.random_document(rng, field=field, value=value), value
        case "video":
            nth = ordinal // 2
            if ordinal % 2:
                scene = clips.random_move(rng, motion=("left", "right")[nth % 2])
            else:
                scene = clips.random_change(rng, first=tuple(INKS)[nth % len(INKS)])
        case _:
            raise ValueError(f"no question type {question_type!r}; there are {question_types('all')}")
    return scene, next(q.answer for q in questions_of(scene) if q.type == question_type)


def questions_of(scene: Scene) -> tuple[scenes.Question, ...]:
    """Returns what can be asked about a scene."""
    match scene:
        case scenes.ShapesScene():
            return scenes.shapes_questions(scene)
        case scenes.BarsScene():
            return scenes.bars_questions(scene)
        case pages.PrintScene():
            return pages.print_questions(scene)
        case pages.DocumentScene():
            return pages.document_questions(scene)
        case clips.ClipScene():
            return clips.clip_questions(scene)


def attachment_of(scene: Scene, split: Split, rng: random.Random) -> Attachment:
    """Returns a picture or clip of a scene that belongs to the split."""
    match scene:
        case scenes.ShapesScene():
            data = image_in_split(split, lambda: scenes.draw_shapes(scene, rng))
        case scenes.BarsScene():
            data = image_in_split(split, lambda: scenes.draw_bars(scene, rng))
        case pages.PrintScene():
            data = image_in_split(split, lambda: pages.draw_print(scene, rng))
        case pages.DocumentScene():
            data = image_in_split(split, lambda: pages.draw_document(scene, rng))
        case clips.ClipScene():
            clip = video_in_split(split, lambda: clips.draw_clip(scene, rng), frames_per_second=clips.FRAMES_PER_SECOND)
            return Attachment(kind="video", data=clip)
    return Attachment(kind="image", data=data)


def clip_of(timeline: timelines.Timeline, split: Split, rng: random.Random) -> Attachment:
    """Returns a clip of a timeline that belongs to the split."""
    rate = timelines.FRAMES_PER_SECOND
    clip = video_in_split(split, lambda: timelines.draw_timeline(timeline, rng), frames_per_second=rate)
    return Attachment(kind="video", data=clip)


def _talk(scene: Scene, rng: random.Random, *, least: int) -> Conversation:
    """Returns a train conversation of at least `least` questions about a scene, or of all there are."""
    return ask_about(attachment_of(scene, "train", rng), shuffled(questions_of(scene), rng, least=least), rng)


def _caption(scene: scenes.ShapesScene | scenes.BarsScene, rng: random.Random) -> Conversation:
    """Returns a train conversation that asks for the description of a scene."""
    answer = scenes.shapes_caption(scene) if isinstance(scene, scenes.ShapesScene) else scenes.bars_caption(scene)
    wordings = ("Describe the image.", "What does the image show?", "Say what you see.")
    question = scenes.Question(type="caption", wordings=wordings, answer=answer)
    return ask_about(attachment_of(scene, "train", rng), [question], rng)
