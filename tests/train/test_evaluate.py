"""Held-out questions with less to see, and what guessing would score."""

import torch

from eagle_train.model.generate import Prompt
from eagle_train.train.evaluate import Question, chance, grey, shuffled
from eagle_train.types import Media, MediaPlan, Sample


def question_about(kinds, plans):
    num_tiles = sum(plan.num_tiles for plan in plans)
    pixels = torch.arange(num_tiles, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    media = tuple(Media(kind=kind, member=f"{place}") for place, kind in enumerate(kinds))
    return Question(Sample(key="s/1", source="s", messages=(), media=media), Prompt([1], [0], pixels), tuple(plans))


def test_shuffled_frames_are_those_of_their_own_video_and_images_stay():
    tiles, frames = MediaPlan(rows=2, cols=2), MediaPlan(num_frames=6)
    question = question_about(["video", "image", "video"], [frames, tiles, frames])
    order = shuffled(question).prompt.pixels[:, 0, 0, 0].tolist()
    assert sorted(order[:6]) == list(range(6)) and order[:6] != list(range(6))
    assert order[6:10] == [6, 7, 8, 9]
    assert sorted(order[10:]) == list(range(10, 16)) and order[10:] != list(range(10, 16))
    assert order == shuffled(question).prompt.pixels[:, 0, 0, 0].tolist()  # the same whenever it is asked


def test_grey_images_show_nothing():
    question = question_about(["image"], [MediaPlan(rows=2)])
    assert set(grey(question).prompt.pixels.flatten().tolist()) == {128}


def test_chance_is_the_commonest_answer_or_a_guess_among_those_the_question_names():
    facts = [("colour", "red", None), ("colour", "red", None), ("colour", "blue", None), ("colour", "cyan", None)]
    facts += [("first", answer, 2) for answer in ("red", "blue", "green", "cyan", "yellow")]
    assert dict(chance(facts)) == {"colour": 0.5, "first": 0.5}
