"""Videos: header facts, upright frames, one error for hostile bytes."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from eagle_train.data import video_frames
from eagle_train.data.frames import frame_indices, shown_seconds
from eagle_train.data.media import MediaError
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.data.videos import probe_video
from eagle_train.types import Media
from tests.pictures import SIZE, corners, quarters

STEP = 20  # grey levels between one frame of a test video and the next


def video(num_frames, *, suffix="mp4", codec="libx264", size=SIZE, pts=None, options=None, picture=None):
    """A video whose frame i is grey of level i * STEP, or `picture(i)`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=suffix, options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 10)
        for i in range(num_frames):
            image = picture(i) if picture else Image.new("RGB", size, (i * STEP,) * 3)
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = (pts[i] if pts else i), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def numbers(frames):
    return [round(np.asarray(frame).mean() / STEP) for frame in frames]


def frames_of(data, wanted):
    """The chosen frames of a whole video, as training decodes them."""
    facts = probe_video(data)
    return list(PyAvVideo().decode(data, shown_seconds(Media(kind="video", **facts._asdict()), wanted)))


CONTAINERS = {
    "mp4": {},
    "webm": {"suffix": "webm", "codec": "libvpx"},
    "live webm": {"suffix": "webm", "codec": "libvpx", "options": {"live": "1"}},
    "avi": {"suffix": "avi", "codec": "mpeg4"},
}
VARIABLE = {"suffix": "matroska", "pts": [0, 1, 2, 9, 10, 11, 12, 40, 41, 60, 61, 62]}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("wanted", [1, 2, 3, 5, 12, 13, 30])
def test_frames_are_evenly_spaced_from_first_to_last(name, wanted):
    frames = frames_of(video(12, **CONTAINERS[name]), wanted)
    assert numbers(frames) == frame_indices(12, wanted)
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", SIZE)}


def test_of_a_variable_rate_the_frames_shown_at_even_times_are_taken():
    # 6.3 s in 12 shares: their middles are at 0.26, 0.79, 1.31, ... s.
    assert numbers(frames_of(video(12, **VARIABLE), 12)) == [2, 2, 6, 6, 6, 6, 6, 6, 8, 8, 8, 9]
    seconds = [0.05, 0.15, 0.85, 0.95, 4.05, 6.15]
    frames = PyAvVideo().decode(video(12, **VARIABLE), seconds)
    assert numbers(frames) == [0, 1, 2, 3, 7, 10]


@pytest.mark.parametrize("name", CONTAINERS)
def test_header_facts_of_a_video(name):
    width, height, seconds, frames = probe_video(video(12, **CONTAINERS[name]))
    assert (width, height, frames) == (*SIZE, 12)
    assert seconds == pytest.approx(1.2, abs=0.01)


def test_a_variable_rate_is_measured():
    assert probe_video(video(12, **VARIABLE)) == (*SIZE, pytest.approx(6.3, abs=0.6), 12)


def test_webm_tells_neither_count_nor_live_duration():
    with av.open(io.BytesIO(video(12, **CONTAINERS["live webm"]))) as container:
        assert container.streams.video[0].frames == 0 and container.duration is None


def test_a_wrong_frame_count_does_not_move_the_frames():
    data = bytearray(video(12, suffix="avi", codec="mpeg4"))
    length = data.index(b"strh") + 8 + 32  # dwLength of the stream header
    assert struct.unpack_from("<I", data, length) == (12,)
    struct.pack_into("<I", data, length, 30)
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == 30
    assert probe_video(bytes(data)).num_frames == 12
    assert numbers(frames_of(bytes(data), 3)) == [0, 6, 11]


# Display matrices (a, b, c, d) of ISO 14496-12: x' = a x + c y, y' = b x + d y, y downwards.
@pytest.mark.parametrize(
    ("matrix", "clockwise"), [((0, 1, -1, 0), 90), ((-1, 0, 0, -1), 180), ((0, -1, 1, 0), 270), ((1, 0, 0, 1), 0)]
)
def test_rotation_metadata_is_applied(matrix, clockwise):
    data = bytearray(video(3, picture=lambda i: quarters()))
    start = data.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">9i", data, start) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a, b, c, d = (value * 65536 for value in matrix)
    struct.pack_into(">9i", data, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    expected = quarters().rotate(-clockwise, expand=True)
    assert probe_video(bytes(data))[:2] == expected.size
    (frame,) = frames_of(bytes(data), 1)
    assert frame.size == expected.size
    np.testing.assert_allclose(corners(frame), corners(expected), atol=40)


def sound():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", video(12)[:200], sound()], ids=["empty", "page", "cut", "sound"]
)
def test_what_is_no_video_is_an_error(data):
    for read in (probe_video, lambda data: list(PyAvVideo().decode(data, [0.0, 1.0]))):
        with pytest.raises(MediaError) as error:
            read(data)
        assert error.value.reason == "unreadable_video"


def test_damage_towards_the_end_of_a_video_is_an_error():
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 64, 3), np.uint8)
    data = bytearray(video(12, picture=lambda i: Image.fromarray(noise[i])))
    end = data.index(b"moov") - 4
    assert end > 10_000
    data[end - 5000 : end] = b"\xff" * 5000
    assert probe_video(bytes(data))[3] == 12
    with pytest.raises(MediaError):
        frames_of(bytes(data), 2)


def test_playlists_that_name_other_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.mp4").write_bytes(video(2))
    playlist = b"ffconcat version 1.0\nfile other.mp4\n"
    (tmp_path / "list.txt").write_bytes(playlist)
    with av.open("list.txt") as container:
        assert len(list(container.decode(video=0))) == 2
    with pytest.raises(MediaError):
        probe_video(playlist)


def test_oversized_frames_are_refused(monkeypatch):
    monkeypatch.setattr(video_frames, "MAX_PIXELS", 64 * 32 - 1)
    for read in (
        lambda data: probe_video(data, max_pixels=64 * 32 - 1),
        lambda data: list(PyAvVideo().decode(data, [0.0])),
    ):
        with pytest.raises(MediaError, match="64 x 32"):
            read(video(2))
