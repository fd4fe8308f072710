"""Videos that are cut, damaged or no videos: each is a counted error, and the others of the run are used."""

import io
import tempfile
from collections import Counter
from pathlib import Path

import av
import pytest

from eagle_train.data import media_content
from eagle_train.data.images import ImageReader
from eagle_train.data.retries import StorageError
from eagle_train.data.shard_reader import Member, MemberFile, ShardReader
from eagle_train.data.shards import scan_shard, write_shards
from eagle_train.data.storage import open_shard
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.data.videos import probe_video
from eagle_train.types import Media, MediaPlan
from tests.data.test_bad_samples import catalog, corrupt, encoder, load, png
from tests.data.test_video_frames import X264, made, write
from tests.data.test_videos import sound, video

__all__ = ["encoder"]


def sample(key, medium, files):
    content = [{"type": "media", "index": 0}, {"type": "text", "text": "Why?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "So."}]
    return key, {"messages": messages, "media": [medium], "meta": {}}, files


def clip(key, data, **bounds):
    return sample(key, {"kind": "video", "member": "0.mp4", **bounds}, {"0.mp4": data})


def damaged_middle(data):
    """A video whose headers and first frames are whole."""
    start, end = data.index(b"mdat"), data.index(b"moov")
    middle = (start + end) // 2
    return data[:middle] + b"\xff" * (end - middle - 8) + data[end - 8 :]


def table_first(data):
    """A video with its table in front of its frames, as it is made for the web."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "v.mp4")
        with av.open(io.BytesIO(data)) as source, av.open(path, "w", options={"movflags": "faststart"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
        return path.read_bytes()


VIDEO = video(30)
NOISE = write("mp4", "libx264", codec_options=X264)
TS = write("mpegts", "libx264", codec_options=X264)
BAD = {
    "empty": (b"", "unreadable_video"),
    "page": (b"<html>404</html>", "unreadable_video"),
    "sound only": (sound(), "unreadable_video"),
    "no frame": (write("mp4", "libx264", num_frames=0), "unreadable_video"),
    "cut before its table": (VIDEO[: len(VIDEO) // 2], "unreadable_video"),
    "cut after its table": (table_first(NOISE)[:-3000], "unreadable_video"),
    "damaged": (damaged_middle(NOISE), "unreadable_video"),
    "picture": (png(), "unreadable_video"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_video_is_counted_and_the_run_goes_on(name, tmp_path, encoder):
    data, reason = BAD[name]
    samples = [clip(f"good{i}", VIDEO) for i in range(5)]
    found = catalog(tmp_path, [*samples, clip("bad", data)], encoder)
    reasons = Counter(error.reason for _, error in found.errors())
    batches = [batch for _, rows in load(found, encoder) for batch in rows]
    reasons += Counter(error.reason for batch in batches for _, error in batch.errors)
    assert reasons == {reason: 1}
    used = [use for batch in batches for use in batch.uses if use.error is None]
    assert len(used) == 5 and all(use.num_frames == 6 for use in used)


def test_clips_frames_and_documents_go_through_the_loader(tmp_path, encoder):
    pages = {f"0.{i}.png": png(i) for i in range(4)}
    samples = [
        clip("clip", VIDEO, start=1.0, end=2.0),
        clip("past-the-end", VIDEO, start=9.0),
        sample("frames", {"kind": "video", "members": list(pages), "fps": 2.0}, pages),
        sample("document", {"kind": "document", "members": list(pages)}, pages),
        sample("bad-page", {"kind": "document", "members": list(pages)}, pages | {"0.2.png": corrupt(2)}),
    ]
    found = catalog(tmp_path, samples, encoder)
    assert [(error.key, error.reason) for _, error in found.errors()] == [("s/s-000000/past-the-end", "empty_clip")]
    batches = [batch for _, rows in load(found, encoder) for batch in rows]
    (bad,) = [error for batch in batches for _, error in batch.errors]
    assert (bad.key, bad.reason) == ("s/s-000000/bad-page", "unreadable_image") and "0.2.png" in bad.detail
    uses = {found.key(use.shard, use.index).rpartition("/")[2]: use for batch in batches for use in batch.uses}
    used = {key: (use.num_frames, use.num_tiles) for key, use in uses.items() if use.error is None}
    assert used == {"clip": (2, 2), "frames": (4, 4), "document": (4, 4)}  # a page counts as a frame


def test_a_clip_shows_its_part_of_the_file():
    media = Media(kind="video", start=1.0, end=2.0, duration=1.0, num_frames=10)
    plan = MediaPlan(num_frames=3)
    frames = list(media_content.pictures(media, plan, VIDEO, ImageReader(), PyAvVideo()))
    whole = list(PyAvVideo().decode(VIDEO, [(i + 0.5) / 10 for i in (10, 14, 19)]))
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in whole]


def test_a_large_video_in_a_shard_is_read_in_parts(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(media_content, "WHOLE_BYTES", 1)
    samples = [clip(f"good{i}", NOISE) for i in range(2)]
    found = catalog(tmp_path, samples, encoder)
    streamed = [batch.pixels.clone() for _, rows in load(found, encoder) for batch in rows]
    monkeypatch.setattr(media_content, "WHOLE_BYTES", 1 << 30)
    whole = [batch.pixels for _, rows in load(found, encoder) for batch in rows]
    assert all((a == b).all() for a, b in zip(streamed, whole, strict=True)) and len(whole) > 0


def test_a_member_reads_as_the_file_it_is(tmp_path):
    (shard,) = write_shards([clip("0", NOISE)], tmp_path / "s")
    reader = open_shard(shard)
    ((_, members),) = scan_shard(reader)
    member = next(member for member in members if member.name == "0.mp4")
    file = reader.open(member)
    assert file.read() == NOISE and file.read(1) == b""
    assert file.seek(-10, io.SEEK_END) == len(NOISE) - 10 and file.read() == NOISE[-10:]
    assert file.seek(5) == 5 and file.seek(3, io.SEEK_CUR) == 8 and file.read(4) == NOISE[8:12]
    assert probe_video(file) == probe_video(NOISE)


class Failing:
    """A shard whose storage stops to answer at a read."""

    gap_bytes = 1 << 12

    def __init__(self, data, reads):
        self.data, self.left = data, reads

    def read_range(self, offset, size):
        self.left -= 1
        if self.left < 0:
            raise StorageError("no answer")
        return self.data[offset : offset + size]


@pytest.mark.parametrize("data", [NOISE, TS, made("vp9"), made("intra only")], ids=["mp4", "ts", "webm", "avi"])
def test_storage_that_does_not_answer_is_no_defect_of_a_video(data):
    member = Member("0.mp4", 0, len(data))
    needed = Failing(data, 10**6)
    expected = [image.tobytes() for image in PyAvVideo().decode(ShardReader(needed).open(member), [0.0, 3.0, 5.9])]
    needed = 10**6 - needed.left
    assert needed > 3
    for reads in range(needed):
        with pytest.raises(StorageError):
            list(PyAvVideo().decode(ShardReader(Failing(data, reads)).open(member), [0.0, 3.0, 5.9]))
    again = PyAvVideo().decode(ShardReader(Failing(data, needed)).open(member), [0.0, 3.0, 5.9])
    assert [image.tobytes() for image in again] == expected


def test_a_member_file_reads_nothing_outside_its_member():
    file = MemberFile(Failing(b"before|inside|after", 10), Member("x", 7, 6))
    assert file.read() == b"inside"
    assert file.seek(4) == 4 and file.read(100) == b"de" and file.seek(50) == 50 and file.read(5) == b""
