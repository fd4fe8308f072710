"""The index of clips, of frames and pages given as images: facts from headers, errors that are counted."""

import io

import pytest
from PIL import Image

from eagle_train.data.images import ImageReader
from eagle_train.data.index import ensure_index
from eagle_train.data.indexed_samples import read_sample
from eagle_train.data.media_input import facts_of
from eagle_train.data.placeholders import MediaRef
from eagle_train.data.shards import write_shards
from eagle_train.data.storage import open_shard
from eagle_train.data.tables import read_table
from eagle_train.types import Media
from tests.data.test_video_frames import write
from tests.data.test_videos import SIZE, video


def picture(width, height, colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "png")
    return buffer.getvalue()


FRAMES = {f"0.{i}.png": picture(8 + i, 8) for i in range(3)}
MP4 = {"0.mp4": video(30)}  # 10 frames per second


def index(tmp_path, medium, files):
    """The row of a sample with one medium."""
    content = [{"type": "media", "index": 0}, {"type": "text", "text": "Why?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "So."}]
    (shard,) = write_shards([("0", {"messages": messages, "media": [medium], "meta": {}}, files)], tmp_path / "set")
    (row,) = read_table(ensure_index(shard)).to_pylist()
    return shard, row


@pytest.mark.parametrize(
    ("medium", "files", "expected"),
    [
        (
            {"kind": "video", "member": "0.mp4"},
            MP4,
            {"member": "0.mp4", "width": SIZE[0], "height": SIZE[1], "duration": 3.0, "num_frames": 30},
        ),
        (
            {"kind": "video", "member": "0.mp4", "start": 0.5, "end": 2.0},
            MP4,
            {"member": "0.mp4", "width": SIZE[0], "height": SIZE[1], "start": 0.5, "end": 2.0, "duration": 1.5,
             "num_frames": 15},
        ),
        (
            {"kind": "video", "member": "0.mp4", "start": 2.5, "end": 9.0},
            MP4,
            {"member": "0.mp4", "width": SIZE[0], "height": SIZE[1], "start": 2.5, "end": 3.0, "duration": 0.5,
             "num_frames": 5},
        ),
        (
            {"kind": "video", "members": list(FRAMES), "fps": 2.0},
            FRAMES,
            {"members": tuple(FRAMES), "width": 10, "height": 8, "duration": 1.5, "num_frames": 3},
        ),
        (
            {"kind": "video", "members": list(FRAMES)},
            FRAMES,
            {"members": tuple(FRAMES), "width": 10, "height": 8, "duration": 3.0, "num_frames": 3},
        ),
        (
            {"kind": "video", "members": list(FRAMES), "min_pixels": 64, "max_pixels": 80},
            FRAMES,
            {"members": tuple(FRAMES), "width": 10, "height": 8, "duration": 3.0, "num_frames": 3, "min_pixels": 64,
             "max_pixels": 80},
        ),
        (
            {"kind": "document", "members": list(FRAMES)},
            FRAMES,
            {"members": tuple(FRAMES), "width": 10, "height": 8, "num_frames": 3},
        ),
    ],
)  # fmt: skip
def test_facts_of_a_medium_are_read_into_the_index_and_back(tmp_path, medium, files, expected):
    shard, row = index(tmp_path, medium, files)
    (media,) = read_sample(open_shard(shard), "set", row).media
    assert media == Media(kind=medium["kind"], **expected)


@pytest.mark.parametrize("kind", ["video", "document"])
def test_pictures_of_a_list_are_as_upright_as_they_are_decoded(tmp_path, kind):
    """Or a grid of their shape would be that of the pictures as stored."""
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6
    image.save(stored := io.BytesIO(), "JPEG", exif=exif)
    files = {"0.0.jpg": stored.getvalue(), "0.1.jpg": stored.getvalue()}
    shard, row = index(tmp_path, {"kind": kind, "members": list(files)}, files)
    (media,) = read_sample(open_shard(shard), "set", row).media
    assert (media.width, media.height, media.orientation) == (40, 20, 6)
    assert ImageReader().size(media) == ImageReader().decode(stored.getvalue()).size == (20, 40)
    asked = facts_of(MediaRef(kind, refs=tuple(files)), list(files.values()), "k")
    assert (asked.width, asked.height, asked.orientation) == (40, 20, 6)


@pytest.mark.parametrize(
    ("medium", "files", "reason"),
    [
        ({"kind": "video", "member": "0.mp4", "start": 3.0}, MP4, "empty_clip"),
        ({"kind": "video", "member": "0.mp4", "start": 7.0, "end": 8.0}, MP4, "empty_clip"),
        ({"kind": "video", "member": "0.mp4"}, {"0.mp4": b"<html>"}, "unreadable_video"),
        ({"kind": "video", "member": "0.mp4"}, {"0.mp4": write("h264", "libx264")}, "unreadable_video"),
        ({"kind": "video", "members": list(FRAMES)}, FRAMES | {"0.2.png": b"<html>"}, "unreadable_image"),
        ({"kind": "document", "members": [*FRAMES, "0.3.png"]}, FRAMES, "missing_media"),
    ],
)
def test_what_is_wrong_with_a_medium_is_counted(tmp_path, medium, files, reason):
    assert index(tmp_path, medium, files)[1]["reason"] == reason
