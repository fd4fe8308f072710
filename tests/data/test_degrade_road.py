"""From shards to encoded samples: what Automatic Degrade Sampling plans is decoded and encoded so, to the token."""

from dataclasses import replace

import pytest

from eagle_train.data.catalog import Source
from eagle_train.data.degrade import AutomaticDegradeSampling
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader
from eagle_train.data.loader import RowDataset
from eagle_train.data.loss_weights import per_token
from eagle_train.data.media_text import MediaText
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.data.shards import write_shards
from eagle_train.data.tile_grids import ImageAreaPreservation
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.assemble import load_tokenizer
from eagle_train.train.config import build, load_choice
from tests.catalogs import read_catalog
from tests.data.test_index_media import picture
from tests.data.test_videos import video

TEXT = MediaText(
    images="<image {number}>",
    video="{ordinal}, {fps:.2f} fps: ",
    frame="{number} at {seconds:.2f}s: ",
    page="p. {number} ",
    separator="\n",
)


@pytest.fixture(scope="module")
def encoder(data):
    return Encoder(
        template=replace(build(load_choice("chat_template", "toy")), media=TEXT),
        tokenizer=load_tokenizer(str(data / "tokenizer")),
        images=ImageReader(),
        videos=PyAvVideo(),
        tiling=ImageAreaPreservation(tile_size=16),
        degrade=AutomaticDegradeSampling(frames=FrameRate(fps=4.0, min_frames=2, max_frames=64)),
        tile_size=16,
        tokens_per_tile=4,
        loss_weight=per_token,
    )


def read(sources, encoder, max_length):
    """Returns the layouts of all usable samples, by number, each encoded as planned."""
    catalog = read_catalog(sources, encoder, max_length)
    dataset = RowDataset(catalog, encoder)
    layouts = {}
    for number in range(len(catalog)):
        layout = catalog.layout_of(number)
        if layout.num_tokens:
            sample = dataset.encode(number, layout, encoder.new_tiles(layout.media))  # raises if the length differs
            assert len(sample.input_ids) == layout.num_tokens <= max_length
            assert len(sample.image_positions) == layout.num_tiles * encoder.tokens_per_tile
            layouts[number] = layout
    dataset.close()
    return layouts


def test_longer_rows_give_the_same_samples_more_frames_and_tiles(data, encoder):
    sources = recipe_sources(load_recipe(str(data / "small.yaml")), data)
    short, middle, long = (read(sources, encoder, max_length) for max_length in (56, 140, 4096))
    assert short.keys() < middle.keys() <= long.keys(), "samples without room for the fewest are left out"
    for fewer, more in ((short, middle), (middle, long)):
        for number, layout in fewer.items():
            other = more[number]
            assert all(a.num_frames <= b.num_frames for a, b in zip(layout.media, other.media, strict=True))
            assert all(a.num_tiles <= b.num_tiles for a, b in zip(layout.media, other.media, strict=True))
        grown = [number for number, layout in fewer.items() if layout.num_tiles < more[number].num_tiles]
        assert len(grown) > 5
    assert any(layout.num_frames < long[number].num_frames for number, layout in middle.items())


def test_clips_lists_of_frames_and_documents_share_a_row(tmp_path, encoder):
    pages = {f"{kind}.{i}.png": picture(40 + i, 30) for kind in (0, 1) for i in range(12)}
    media = [
        {"kind": "document", "members": [name for name in pages if name.startswith("0.")]},
        {"kind": "video", "members": [name for name in pages if name.startswith("1.")], "fps": 4.0},
        {"kind": "video", "member": "2.mp4", "start": 0.5, "end": 2.5},
        {"kind": "image", "member": "0.0.png"},
    ]
    content = [*({"type": "media", "index": index} for index in range(4)), {"type": "text", "text": "Why?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "So."}]
    files = pages | {"2.mp4": video(30)}
    shards = write_shards([("0", {"messages": messages, "media": media, "meta": {}}, files)], tmp_path / "s")
    chosen = {}
    for max_length in range(100, 900, 50):
        layouts = read([Source(name="s", shards=shards)], encoder, max_length)
        if layouts:
            frames, tiles = [plan.num_frames for plan in layouts[0].media[:3]], layouts[0].media[3].num_tiles
            assert layouts[0].num_frames == sum(frames) and (tiles == 1 or frames == [12, 12, 8])
            chosen[max_length] = (*frames, tiles)
    assert len(set(chosen.values())) > 4 and min(chosen) > 100
    assert list(chosen.values()) == sorted(chosen.values(), key=sum)
    assert max(chosen.values(), key=sum)[:3] == (12, 12, 8) and max(chosen.values(), key=sum)[3] > 1
