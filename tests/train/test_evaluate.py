"""Held-out questions with less to see, and what guessing would score."""

from dataclasses import replace

import pytest
import torch

from eagle_train.data.catalog import Source
from eagle_train.data.degrade import EachByItself
from eagle_train.data.frames import FrameRate, frame_indices
from eagle_train.data.loader import RowDataset
from eagle_train.data.shards import write_shards
from eagle_train.model.generate import Prompt
from eagle_train.train.evaluate import Question, chance, grey, read_question, shuffled
from eagle_train.types import Media, MediaPlan, Sample
from tests.catalogs import read_catalog
from tests.data.loads import tiny_encoder
from tests.data.test_index_media import picture


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


@pytest.fixture
def asked(data, tmp_path):
    """A question about 9 frames and 3 pages, each a picture of another size and brightness, and the loader of it."""
    pages = {
        f"{kind}.{i}.png": picture(30 + i, 40 - i, (20 * i + 5,) * 3) for kind, n in ((0, 9), (1, 3)) for i in range(n)
    }
    media = [
        {"kind": "video", "members": [name for name in pages if name.startswith("0.")], "fps": 2.0},
        {"kind": "document", "members": [name for name in pages if name.startswith("1.")]},
    ]
    content = [*({"type": "media", "index": index} for index in range(2)), {"type": "text", "text": "Why?"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "So."}]}
    shards = write_shards([("0", record | {"media": media, "meta": {}}, pages)], tmp_path / "s")
    encoder = replace(tiny_encoder(data), degrade=EachByItself(frames=FrameRate(max_frames=16)))
    dataset = RowDataset(read_catalog([Source(name="s", shards=shards)], encoder, 200), encoder)
    yield dataset
    dataset.close()


@pytest.mark.parametrize("most", [None, 4, 1, 99])
def test_fewer_frames_of_a_list_are_those_of_the_rule_and_documents_keep_their_pages(asked, most):
    question = read_question(asked, 0, most)
    count = min(most or 9, 9)
    assert [plan.num_frames for plan in question.plans] == [count, 3]
    centres = question.prompt.pixels[:, 0, 8, 8].tolist()
    assert centres == [20 * i + 5 for i in frame_indices(9, count)] + [5, 25, 45]
    assert len(question.prompt.image_positions) == (count + 3) * 4
