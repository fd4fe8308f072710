"""What ties a run to its data does not depend on what was done before."""

from dataclasses import replace

import pytest

from eagle_train.data.catalog import Source
from eagle_train.data.degrade import AutomaticDegradeSampling, EachByItself
from eagle_train.data.frames import FrameRate
from eagle_train.data.index import ensure_index
from eagle_train.data.media_text import MediaText
from eagle_train.data.smart_resize import SmartResize
from eagle_train.data.tiling import CentreCrop
from eagle_train.data.too_long import DropTooLong, KeepTurns
from eagle_train.train import stage_data
from eagle_train.train.schedule import Stage
from eagle_train.train.stage_data import describe_layout, make_layout, of_stage
from eagle_train.types import Message
from tests.data.loads import tiny_encoder
from tests.data.test_elsewhere import RED, held, image, write_tar


@pytest.fixture
def encoder(data):
    return tiny_encoder(data)


def test_a_tokenizer_whose_file_asks_for_truncation_is_the_same_before_and_after_it_is_called(encoder):
    plain = describe_layout(make_layout(encoder, 64, DropTooLong()))
    encoder.tokenizer.backend_tokenizer.enable_truncation(5)
    encoder.tokenizer.backend_tokenizer.enable_padding(length=9)
    before = make_layout(encoder, 64, DropTooLong())
    turns = [Message(role="user", content=("a",)), Message(role="assistant", content=("b" * 99,))]
    assert sum(len(run.ids) for run in encoder.template.encode(turns, encoder.tokenizer)) > 9
    after = make_layout(encoder, 64, DropTooLong())
    assert before.fingerprint == after.fingerprint and before.text.fingerprint == after.text.fingerprint
    assert describe_layout(after) == plain


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"max_length": 65}, "max_length"),
        ({"too_long": KeepTurns()}, "too_long"),
        ({"tiling": CentreCrop()}, "tiling"),
        ({"tokens_per_tile": 5}, "tokens_per_tile"),
        ({"degrade": EachByItself(frames=FrameRate(fps=1.0))}, "degrade"),
    ],
)
def test_whatever_lengths_depend_on_is_in_the_fingerprint(encoder, changes, part):
    own = {name: changes[name] for name in ("max_length", "too_long") if name in changes}
    other = replace(encoder, **{name: value for name, value in changes.items() if name not in own})
    one = make_layout(encoder, 64, DropTooLong())
    two = make_layout(other, own.get("max_length", 64), own.get("too_long", DropTooLong()))
    assert one.fingerprint != two.fingerprint
    first, second = describe_layout(one), describe_layout(two)
    assert {name for name in first if first[name] != second[name]} == {part}


def test_a_raised_version_makes_layouts_anew(encoder, monkeypatch):
    before = make_layout(encoder, 64, DropTooLong())
    monkeypatch.setattr(stage_data, "LAYOUT_VERSION", f"{stage_data.LAYOUT_VERSION}+")
    after = make_layout(encoder, 64, DropTooLong())
    assert before.fingerprint != after.fingerprint and before.text.fingerprint == after.text.fingerprint


def test_text_lengths_are_shared_by_templates_that_differ_in_the_text_of_media_alone(encoder):
    numbered = replace(encoder, template=replace(encoder.template, media=MediaText(images="<image {number}>")))
    one, two = make_layout(encoder, 64, DropTooLong()), make_layout(numbered, 64, DropTooLong())
    assert one.text.fingerprint == two.text.fingerprint and one.fingerprint != two.fingerprint


def test_a_stage_may_choose_frames_and_tiles_by_a_policy_of_its_own(encoder):
    own = AutomaticDegradeSampling(frames=FrameRate(max_frames=512))
    stage = Stage(recipe="r", learning_rates={}, max_length=64, rows_per_step=1, num_steps=1, degrade=own)
    assert of_stage(encoder, stage).degrade is own
    assert of_stage(encoder, replace(stage, degrade=None)).degrade is encoder.degrade
    caps = replace(own, tile_caps=(4, 1))
    prints = [make_layout(replace(encoder, degrade=each), 64, DropTooLong()).fingerprint for each in (own, caps)]
    assert len({*prints, make_layout(encoder, 64, DropTooLong()).fingerprint}) == 3


@pytest.mark.parametrize(
    ("wish", "told"), [({"max_pixels": 3136}, "max_pixels"), ({"total_pixels": 784}, None), ({}, None)]
)
def test_a_run_of_tiles_tells_of_sizes_that_it_does_not_follow(tmp_path, caplog, wish, told):
    record = image(held(RED), **wish)  # an image has no use for all pixels of a video
    shard = write_tar(tmp_path / "s" / "0.tar", [image(held(RED)), record])
    ensure_index(shard)
    stage_data.note_sizes([Source(name="web", shards=[shard, tmp_path / "gone.tar"])], CentreCrop())
    assert [told in text and "source web" in text for text in caplog.messages] == ([True] if told else [])
    caplog.clear()
    stage_data.note_sizes([Source(name="web", shards=[shard])], SmartResize())
    assert caplog.messages == []
