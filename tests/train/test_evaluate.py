"""Held-out questions with less to see."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from eagle_train.data.catalog import Source
from eagle_train.data.degrade import EachByItself
from eagle_train.data.frames import FrameRate, frame_indices
from eagle_train.data.loader import RowDataset
from eagle_train.data.shards import write_shards
from eagle_train.model.generate import Prompt
from eagle_train.train.evaluate import Question, grey, read_question, read_questions, shuffled, views
from eagle_train.types import Media, MediaPlan, Message, Sample
from tests.catalogs import read_catalog
from tests.data.loads import tiny_encoder
from tests.data.test_bad_samples import corrupt
from tests.data.test_index_media import picture


def question_about(kinds, plans):
    num_tiles = sum(plan.num_tiles for plan in plans)
    pixels = torch.arange(num_tiles, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    media = tuple(Media(kind=kind, member=f"{place}") for place, kind in enumerate(kinds))
    return Question(
        Sample(key="s/1", source="s", messages=(), media=media), Prompt([1], [0], pixels, torch.arange(1)), tuple(plans)
    )


def test_shuffled_frames_are_those_of_their_own_video_and_images_stay():
    tiles, frames = MediaPlan(rows=2, cols=2), MediaPlan(num_frames=6)
    question = question_about(["video", "image", "video"], [frames, tiles, frames])
    order = shuffled(question).prompt.pixels[:, 0, 0, 0].tolist()
    assert sorted(order[:6]) == list(range(6)) and order[:6] != list(range(6))
    assert order[6:10] == [6, 7, 8, 9]
    assert sorted(order[10:]) == list(range(10, 16)) and order[10:] != list(range(10, 16))
    assert order == shuffled(question).prompt.pixels[:, 0, 0, 0].tolist()  # the same whenever it is asked


def test_spaces_around_an_answer_do_not_make_it_wrong():
    """What the model says is compared without them."""
    question = question_about(["image"], [MediaPlan()])
    messages = (Message(role="user", content=(0, "Why?")), Message(role="assistant", content=(" So.\n",)))
    assert replace(question, sample=replace(question.sample, messages=messages)).answer == "So."


def test_grey_images_show_nothing():
    question = question_about(["image"], [MediaPlan(rows=2)])
    assert set(grey(question).prompt.pixels.flatten().tolist()) == {128}


PAGES = {f"0.{i}.png": picture(30 + i, 40 - i, (20 * i + 5,) * 3) for i in range(9)}
"""Frames of a video and pages of a document, each of another size and brightness."""
PAGES |= {f"1.{i}.png": picture(40 + i, 30, (20 * i + 5,) * 3) for i in range(3)}


def loader_of(data, folder, max_frames, pages=PAGES):
    """The loader of a question about both."""
    media = [
        {"kind": "video", "members": [name for name in pages if name.startswith("0.")], "fps": 2.0},
        {"kind": "document", "members": [name for name in pages if name.startswith("1.")]},
    ]
    content = [*({"type": "media", "index": index} for index in range(2)), {"type": "text", "text": "Why?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "So."}]
    shards = write_shards([("0", {"messages": messages, "media": media, "meta": {}}, pages)], folder / "s")
    encoder = replace(tiny_encoder(data), degrade=EachByItself(frames=FrameRate(max_frames=max_frames)))
    return RowDataset(read_catalog([Source(name="s", shards=shards)], encoder, 200), encoder)


@pytest.mark.parametrize("most", [None, 4, 1, 99])
def test_fewer_frames_of_a_list_are_those_of_the_rule_and_documents_keep_their_pages(data, tmp_path, most):
    with closing(loader_of(data, tmp_path, 16)) as dataset:
        question = read_question(dataset, 0, most)
    count = min(most or 9, 9)
    assert [plan.num_frames for plan in question.plans] == [count, 3]
    centres = question.prompt.pixels[:, 0, 8, 8].tolist()
    assert centres == [20 * i + 5 for i in frame_indices(9, count)] + [5, 25, 45]
    assert len(question.prompt.image_positions) == (count + 3) * 4


def test_a_damaged_frame_takes_a_question_out_of_the_views_that_show_it(data, tmp_path, caplog):
    assert 4 in frame_indices(9, 3) and 4 not in frame_indices(9, 4)
    with closing(loader_of(data, tmp_path, 4, PAGES | {"0.4.png": corrupt()})) as dataset:
        questions = read_questions(dataset, [0])
        found = views(dataset, questions, [2, 3])
    assert questions.keys() == {0} and caplog.text.count("unreadable_image") == 1
    asked = {view: list(seen) for view, seen in found.items()}
    seen = ("eval", "eval_grey", "eval_shuffled", "eval_frames_2")
    assert asked == {view: [0] for view in seen} | {"eval_frames_3": []}
