"""Many frames of a large video in a shard: only a few of them, and a part of the file, are in memory at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from eagle_train.data.shards import write_shards
from eagle_train.data.videos import WHOLE_BYTES
from tests.data.test_video_faults import clip
from tests.data.test_video_frames import X264, write

FRAME = 640 * 480 * 3
NUM_FRAMES = 128
FEW = 16 * FRAME
"""Bytes. About half of that is used; the file, or all frames as pictures, are several times as much."""

READ = """
import sys
from pathlib import Path
import numpy as np
from eagle_train.data.elsewhere import MediaFile
from eagle_train.data.frames import shown_seconds
from eagle_train.data.images import ImageReader
from eagle_train.data.media_content import pictures, read_content
from eagle_train.data.shards import scan_shard
from eagle_train.data.storage import open_shard
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.data.videos import probe_video
from eagle_train.types import Media, MediaPlan

reader = open_shard(sys.argv[1])
((_, members),) = scan_shard(reader)
files = {member.name: MediaFile(reader, member) for member in members}
media = Media(kind="video", member="0.mp4", **probe_video(files["0.mp4"].open())._asdict())

def read(num_frames):
    plan = MediaPlan(num_frames=num_frames)
    (content,) = read_content(files, [media], [plan])
    return [int(np.asarray(picture)[0, 0, 0]) for picture in pictures(media, plan, content, ImageReader(), PyAvVideo())]

def kib(what):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(what))

read(2)
Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held; that of getrusage is the parent's
held = kib("VmRSS")
found = read(int(sys.argv[2]))
print(len(found), kib("VmHWM") - held)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux")
def test_128_frames_of_a_large_video_take_the_memory_of_a_few(tmp_path):
    options = X264 | {"preset": "ultrafast", "crf": "16"}
    data = write("mp4", "libx264", num_frames=150, size=(640, 480), codec_options=options)
    assert len(data) > max(WHOLE_BYTES, 1.5 * FEW)
    (shard,) = write_shards([clip("0", data)], tmp_path / "s")
    run = subprocess.run(
        [sys.executable, "-c", READ, str(shard), str(NUM_FRAMES)], capture_output=True, text=True, check=True
    )
    count, kib = map(int, run.stdout.split())
    assert count == NUM_FRAMES
    assert kib * 1024 < FEW
