"""Toy clips: what their pixels show is what the answers say, and no answer is likelier than another."""

import io
import random
from collections import Counter

import av
import numpy as np
import pytest

from eagle_train.data.toy import timelines
from eagle_train.data.toy.draw import INKS
from eagle_train.data.toy.samples import question_types, toy_sample, toy_samples


def seconds_of(frames):
    """Returns the frames in the middle of each second, as float arrays."""
    half = timelines.FRAMES_PER_SECOND // 2
    return [np.asarray(frame, dtype=float) for frame in frames[half :: timelines.FRAMES_PER_SECOND]]


def nearest_ink(frame):
    """Returns the ink that most of the pixels of ink colour are nearest to."""
    names = list(INKS)
    distances = np.stack([np.abs(frame - INKS[name]).sum(-1) for name in names])
    near = distances.min(0) < 60
    return names[Counter(distances.argmin(0)[near].tolist()).most_common(1)[0][0]] if near.any() else None


def asked(scene, question_type, seed=0):
    questions = timelines.timeline_questions(scene, random.Random(seed))
    return next(question for question in questions if question.type == question_type)


@pytest.mark.parametrize("seed", range(8))
def test_the_colour_at_a_second_is_the_one_drawn_there(seed):
    rng = random.Random(seed)
    scene = timelines.random_colours(rng)
    seen = [nearest_ink(frame) for frame in seconds_of(timelines.draw_timeline(scene, rng))]
    question = asked(scene, "colour_at", seed)
    second = int("".join(c for c in question.wordings[0] if c.isdigit()))
    assert seen[second] == seen[second - 1] == question.answer  # it holds around the second that is asked for


@pytest.mark.parametrize("seed", range(8))
def test_the_colour_that_came_first_is_drawn_before_the_other(seed):
    rng = random.Random(seed)
    scene = timelines.random_colours(rng)
    seen = [nearest_ink(frame) for frame in seconds_of(timelines.draw_timeline(scene, rng))]
    question = asked(scene, "first_colour", seed)
    pair = [name for name in INKS if f" {name}" in question.wordings[0]]
    assert question.answer == min(pair, key=seen.index) and len(pair) == 2


@pytest.mark.parametrize("motion", ["left", "right"])
def test_a_disc_moves_as_it_is_said(motion):
    rng = random.Random(1)
    scene = timelines.random_move(rng, motion=motion)
    frames = [np.asarray(frame, dtype=float) for frame in timelines.draw_timeline(scene, rng)]
    places = [np.argwhere(np.abs(frame - INKS[scene.ink]).sum(-1) < 60)[:, 1].mean() for frame in frames]
    steps = np.diff(places)
    assert (steps > 0).all() if motion == "right" else (steps < 0).all()
    assert asked(scene, "direction").answer == motion


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_lamp_lights_up_as_often_as_it_is_said(count):
    rng = random.Random(count)
    scene = timelines.random_flashes(rng, count=count)
    lit = [nearest_ink(frame) == scene.ink for frame in seconds_of(timelines.draw_timeline(scene, rng))]
    rises = [second for second in range(1, len(lit)) if lit[second] and not lit[second - 1]]
    assert not lit[0] and not lit[-1] and rises == list(scene.starts)
    assert asked(scene, "flashes").answer == str(len(rises))
    assert all(lit[start + 1] for start in rises)  # for two seconds: one frame a second shows all flashes
    assert 18 <= scene.duration <= 24  # whatever the count


def test_clips_have_the_frames_of_their_seconds():
    for index in range(6):
        _, _, media = toy_sample("timelines", "train", index, 0)
        with av.open(io.BytesIO(media["0.mp4"])) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        assert len(frames) % timelines.FRAMES_PER_SECOND == 0 and len(frames) >= 3 * timelines.FRAMES_PER_SECOND
        assert all(timelines.SIDES[0] <= side <= timelines.SIDES[1] and side % 2 == 0 for side in frames[0].size)


@pytest.mark.slow
def test_heldout_questions_take_turns_and_say_how_many_answers_they_name():
    made = list(toy_samples("timelines", "heldout", 96, 0))
    types = Counter(record["meta"]["type"] for _, record, _ in made)
    assert types == dict.fromkeys(question_types("timelines"), 24)
    answers = {name: Counter() for name in types}
    for _, record, _ in made:
        answer = record["messages"][-1]["content"][0]["text"]
        answers[record["meta"]["type"]][answer] += 1
        question = record["messages"][0]["content"][-1]["text"]
        named = record["meta"].get("num_options")
        assert (named == 2) == (" or " in question) and (named is None or f" {answer}" in question)
    assert answers["flashes"] == dict.fromkeys("1234", 6) and answers["direction"] == {"left": 12, "right": 12}
    assert set(answers["colour_at"]) == set(INKS)
