"""The policy on images from the index to the tiles, and in the identity of a run."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from eagle_train.data.catalog import Source
from eagle_train.data.degrade import EachByItself
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader, probe_image
from eagle_train.data.index import ensure_index
from eagle_train.data.loss_weights import per_token
from eagle_train.data.shards import write_shards
from eagle_train.data.tables import read_table
from eagle_train.data.tiling import PadToSquare
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.assemble import build_encoder, build_schedule, load_tokenizer
from eagle_train.train.config import build, load_choice
from eagle_train.train.costs import ForwardFlops
from eagle_train.train.stage_data import build_stage_data
from eagle_train.types import Media, MediaPlan, SampleError
from tests.catalogs import read_catalog
from tests.pictures import SIZE, quarters, saved
from tests.runs import config

TURNED = {"exif": Image.Exif()}
TURNED["exif"][0x0112] = 6


class OneTilePerColumn(PadToSquare):
    """As many tiles as the image is 32 pixels wide; tells a turned image from an upright one."""

    def plan(self, width, height):
        return MediaPlan(cols=width // 32)


@pytest.fixture
def encoder(data):
    return Encoder(
        template=build(load_choice("chat_template", "toy")),
        tokenizer=load_tokenizer(str(data / "tokenizer")),
        images=ImageReader(),
        videos=PyAvVideo(),
        tiling=OneTilePerColumn(),
        degrade=EachByItself(frames=FrameRate()),
        tile_size=16,
        tokens_per_tile=4,
        loss_weight=per_token,
    )


@pytest.fixture
def shard(tmp_path):
    """Two samples: an upright image of 64 x 32 pixels, and the same stored in 32 columns, to be turned."""
    content = [{"type": "media", "index": 0}, {"type": "text", "text": "what is it?"}]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "a flag"}]},
    ]
    record = {"messages": turns, "media": [{"kind": "image", "member": "0.jpg"}], "meta": {}}
    stored = quarters().transpose(Image.Transpose.ROTATE_90)
    pictures = {"upright": saved(quarters(), "jpeg"), "turned": saved(stored, "jpeg", **TURNED)}
    (shard,) = write_shards([(key, record, {"0.jpg": data}) for key, data in pictures.items()], tmp_path / "s")
    return shard


def read(shard, encoder):
    return read_catalog([Source(name="s", shards=[shard])], encoder, 512)


def test_the_index_keeps_sizes_as_stored_and_the_plan_turns_them(shard, encoder):
    facts = [media[0] for media in read_table(ensure_index(shard))["media"].to_pylist()]
    assert [(fact["width"], fact["height"], fact["orientation"]) for fact in facts] == [(64, 32, 1), (32, 64, 6)]
    assert read(shard, encoder).sizes(0).num_tiles.tolist() == [2, 2]
    stored = replace(encoder, images=ImageReader(exif_orientation=False))
    assert read(shard, stored).sizes(0).num_tiles.tolist() == [2, 1]


def test_images_over_the_limit_of_a_run_are_counted(shard, encoder):
    strict = replace(encoder, images=ImageReader(max_pixels=64 * 32 - 1))
    found = read(shard, strict)
    assert found.dropped() == {"s": {"unreadable_image": 2}}
    assert all("data.images.max_pixels" in str(error) for _, error in found.errors())
    assert not list(read(shard, encoder).errors())


def test_tiles_show_the_image_as_the_policy_says(encoder):
    data = saved(quarters().transpose(Image.Transpose.ROTATE_90), "png", **TURNED)
    width, height, orientation = probe_image(data)
    media = Media(kind="image", member="0.png", width=width, height=height, orientation=orientation)
    upright, wanted, stored = (encoder.new_tiles([MediaPlan()]) for _ in range(3))
    encoder.decode("k", media, MediaPlan(), data, upright)
    PadToSquare().cut(quarters(), MediaPlan(), wanted)
    np.testing.assert_array_equal(upright, wanted)
    replace(encoder, images=ImageReader(exif_orientation=False)).decode("k", media, MediaPlan(), data, stored)
    assert not (stored == upright).all()


def test_an_image_that_is_not_the_one_of_the_index_is_a_bad_sample(encoder):
    media = Media(kind="image", member="0.png", width=SIZE[0], height=SIZE[1])
    tile = encoder.new_tiles([MediaPlan()])
    encoder.decode("k", media, MediaPlan(), saved(quarters()), tile)
    with pytest.raises(SampleError, match=r"0\.png: \(64, 32\) pixels, the index says \(32, 64\)") as error:
        encoder.decode("k", replace(media, width=32, height=64), MediaPlan(), saved(quarters()), tile)
    assert (error.value.key, error.value.reason) == ("k", "length_mismatch")


@pytest.mark.slow
def test_the_policy_is_a_part_of_the_plans_identity(data, tmp_path):
    flops = ForwardFlops(per_token=1e6, per_token_squared=0.0, per_target=0.0, encoders={}, fusion=0)

    def layout(*overrides):
        chosen = config(data, tmp_path, *overrides)
        stage = next(iter(build_schedule(chosen).values()))
        return build_stage_data(chosen, stage, build_encoder(chosen, 16, 10_000), flops).identity["layout"]

    plain = layout()
    assert layout() == plain
    for override in ("exif_orientation=false", "max_pixels=99999", "background=[0,0,0]"):
        changed = layout(f"data.images.{override}")
        assert {name for name in plain if plain[name] != changed[name]} == {"images"}
    assert plain["videos"] == repr(PyAvVideo())
