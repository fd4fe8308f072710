"""Frames reached by jumps equal those of decoding everything from the start, bit for bit, whatever the file is like."""

import io
import math
import random
from bisect import bisect_right
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import av
import numpy as np
import pytest

from eagle_train.data.frames import shown_seconds
from eagle_train.data.media import MediaError
from eagle_train.data.video_frames import Playback, PyAvVideo
from eagle_train.data.videos import open_video, probe_video, video_stream
from eagle_train.types import Media

FPS = 25
VARIABLE = np.cumsum(np.random.default_rng(1).integers(1, 400, 150)).tolist()  # milliseconds
X264 = {"bf": "3", "g": "40", "preset": "veryfast"}
STEADY = {"bf": "2", "g": "40", "preset": "ultrafast"}  # a key frame every 40, and two B frames between others
OPEN_GOP = {"bf": "3", "x264-params": "open-gop=1:keyint=30:min-keyint=30:scenecut=0"}
X265 = {"preset": "ultrafast", "x265-params": "keyint=30:bframes=3:open-gop=1:log-level=none"}
VP9 = {"g": "30", "deadline": "realtime", "cpu-used": "8"}
MPEG = {"bf": "2", "g": "15"}


def moving(num_frames, size):
    """Frames (height, width, 3) uint8 of noise that moves, so that no two are alike."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return (np.ascontiguousarray(np.roll(noise, (i * 3, i * 5), (0, 1))) for i in range(num_frames))


def write(
    form, codec, *, num_frames=150, size=(64, 48), pixels="yuv420p", codec_options=None, options=None, times=None
):
    """The bytes of a video; `times` are the timestamps of its frames in milliseconds."""
    buffer = io.BytesIO()
    base = Fraction(1, 1000) if times else Fraction(1, FPS)
    with av.open(buffer, "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=FPS, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if times:
            stream.time_base = stream.codec_context.time_base = base
        for i, picture in enumerate(moving(num_frames, size)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (times[i] if times else i), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


FILES = {
    "b frames": ("mp4", "libx264", {"codec_options": X264}),
    "steady": ("mp4", "libx264", {"codec_options": STEADY}),
    "fragmented": ("mp4", "libx264", {"codec_options": X264, "options": {"movflags": "frag_keyframe+empty_moov"}}),
    "open gop": ("mp4", "libx264", {"codec_options": OPEN_GOP}),
    "open gop mkv": ("matroska", "libx264", {"codec_options": OPEN_GOP}),
    "open gop ts": ("mpegts", "libx264", {"codec_options": OPEN_GOP}),
    "intra refresh": ("mp4", "libx264", {"codec_options": {"x264-params": "intra-refresh=1:keyint=30"}}),
    "intra refresh ts": ("mpegts", "libx264", {"codec_options": {"x264-params": "intra-refresh=1:keyint=30"}}),
    "variable rate": ("mp4", "libx264", {"codec_options": X264, "times": VARIABLE}),
    "variable rate mkv": ("matroska", "libx264", {"codec_options": X264, "times": VARIABLE}),
    "starts late": ("mp4", "libx264", {"codec_options": X264, "times": [t + 5000 for t in VARIABLE]}),
    "starts late mkv": ("matroska", "libx264", {"codec_options": X264, "times": [t + 5000 for t in VARIABLE]}),
    "flv": ("flv", "libx264", {"codec_options": X264}),
    "b frames in avi": ("avi", "libx264", {"codec_options": X264}),
    "10 bit": ("mp4", "libx264", {"codec_options": X264, "pixels": "yuv420p10le"}),
    "odd size": ("mp4", "mpeg4", {"size": (67, 45)}),
    "odd size 444": ("matroska", "libx264", {"size": (67, 45), "pixels": "yuv444p", "codec_options": X264}),
    "mpeg4 avi": ("avi", "mpeg4", {"codec_options": {"g": "20"}}),
    "mpeg4 b frames": ("mp4", "mpeg4", {"codec_options": MPEG}),
    "mpeg2 ps": ("mpeg", "mpeg2video", {"codec_options": MPEG}),
    "mpeg2 ts": ("mpegts", "mpeg2video", {"codec_options": MPEG}),
    "vp8": ("webm", "libvpx", {"codec_options": {"g": "30", "cpu-used": "8"}}),
    "vp9": ("webm", "libvpx-vp9", {"codec_options": VP9}),
    "vp9 without cues": ("webm", "libvpx-vp9", {"codec_options": VP9, "options": {"live": "1"}}),
    "hevc": ("mp4", "libx265", {"codec_options": X265}),
    "hevc ts": ("mpegts", "libx265", {"codec_options": X265}),
    "hevc 10 bit": ("matroska", "libx265", {"codec_options": X265, "pixels": "yuv420p10le"}),
    "intra only": ("avi", "mjpeg", {"pixels": "yuvj420p"}),
    "gif": ("gif", "gif", {"pixels": "rgb8", "num_frames": 60}),
}


@lru_cache(maxsize=1)
def made(name):
    form, codec, arguments = FILES[name]
    return write(form, codec, **arguments)


def decode_all(data):
    """Timestamps and pixels of all frames, decoded from the start, and the seconds of a tick.

    AVI and MPEG program streams give some frames out of order; those are never shown.
    """
    times, pixels = [], []
    with open_video(data, 10**6) as container:
        stream = video_stream(container)
        for frame in container.decode(stream):
            if not times or frame.pts > times[-1]:
                times.append(frame.pts)
                pixels.append(frame.to_ndarray(format="rgb24"))
        return times, pixels, float(stream.time_base)


def expected(times, pixels, tick, seconds):
    """The frame shown at a time."""
    return pixels[max(0, bisect_right(times, times[0] + math.floor(seconds / tick)) - 1)]


@pytest.mark.parametrize("name", FILES)
def test_chosen_frames_equal_those_of_decoding_everything(name):
    data = made(name)
    times, pixels, tick = decode_all(data)
    assert len(times) > 50 and any((a != b).any() for a, b in pairwise(pixels))
    media = Media(kind="video", **probe_video(data)._asdict())
    for wanted in (1, 2, 5, 23, media.num_frames):
        seconds = shown_seconds(media, wanted)
        for second, image in zip(seconds, PyAvVideo().decode(data, seconds), strict=True):
            np.testing.assert_array_equal(np.asarray(image), expected(times, pixels, tick, second))


@pytest.mark.parametrize("name", FILES)
def test_times_in_any_order_give_the_same_frames(name):
    data = made(name)
    times, pixels, tick = decode_all(data)
    playback = Playback(data, 10**6)
    draw = random.Random(0)
    for _ in range(25):
        second = draw.random() * (times[-1] - times[0]) * tick
        image = playback.to_image(playback.frame_at(second))
        np.testing.assert_array_equal(np.asarray(image), expected(times, pixels, tick, second))
    playback.close()


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv420p10le", "rgb24"])
@pytest.mark.parametrize("width", [2, 48, 64, 65, 66, 68, 72, 80, 98, 112])
def test_pixels_are_those_of_plain_rgb_whatever_the_width(width, pixels):
    playback = Playback(made("b frames"), 10**6)
    for picture in moving(3, (width, 46)):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
        image = playback.to_image(frame)
        assert (image.mode, image.size) == ("RGB", (width, 46))
        np.testing.assert_array_equal(np.asarray(image), frame.to_ndarray(format="rgb24"))
    playback.close()


def test_a_picture_outlives_its_video():
    frames = PyAvVideo().decode(made("b frames"), [0.5, 1.5])
    images = [next(frames), next(frames)]
    frames.close()
    others = {image.tobytes() for image in PyAvVideo().decode(made("b frames"), [2.5, 3.5, 4.5])}  # in freed memory
    again = [image.tobytes() for image in PyAvVideo().decode(made("b frames"), [0.5, 1.5])]
    assert [image.tobytes() for image in images] == again and others.isdisjoint(again)


@pytest.mark.parametrize("name", ["b frames", "open gop mkv", "mpeg2 ts", "vp9", "intra only"])
def test_only_what_is_needed_is_decoded(name):
    counted = CountedPlayback(made(name), 10**6)
    counted.frame_at(5.5)  # of 6 seconds
    assert 2 < counted.decoded < 75


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_jump_reaches_the_key_frame_just_before_a_time(after):
    counted = CountedPlayback(made("steady"), 10**6)
    for key in (40, 80, 120):
        counted.frame_at((key - 20.5) / FPS)
        before = counted.decoded
        counted.frame_at((key + after + 0.5) / FPS)
        assert counted.decoded - before == 2 + after


def test_neighbouring_frames_are_decoded_once():
    counted = CountedPlayback(made("b frames"), 10**6)
    for i in range(150):
        counted.frame_at((i + 0.5) / FPS)
    assert counted.decoded <= 151 + 4  # the frames, their end, and what a jump to each of the key frames decodes again


class CountedPlayback(Playback):
    """Counts the frames that are decoded; none is passed over."""

    decoded = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._margin = math.inf

    def _decode(self, *arguments, **keywords):
        self.decoded += 1
        return super()._decode(*arguments, **keywords)


class CountedFile(io.BytesIO):
    count = 0

    def read(self, size=-1):
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.mark.slow
def test_a_large_file_is_read_where_its_frames_are():
    data = write("mp4", "libx264", num_frames=1500, size=(160, 120), codec_options=X264 | {"crf": "1"})
    file = CountedFile(data)
    assert len(list(PyAvVideo().decode(file, [0.0, 30.0, 59.9]))) == 3
    assert 0 < file.count < 0.25 * len(data)


def test_of_a_time_after_the_end_the_file_must_tell_why():
    data = made("b frames")  # 6 seconds
    (image,) = PyAvVideo().decode(data, [6.9])
    np.testing.assert_array_equal(np.asarray(image), decode_all(data)[1][-1])
    with pytest.raises(MediaError, match=r"last frame is at 5.960 s, another was to be at 7.500 s"):
        list(PyAvVideo().decode(data, [7.5]))


def test_frames_come_one_at_a_time():
    frames = PyAvVideo().decode(made("b frames"), [0.0, 1.0, 99.0])
    assert len({next(frames).tobytes(), next(frames).tobytes()}) == 2
    with pytest.raises(MediaError):
        next(frames)


def test_a_stream_without_timestamps_is_refused_with_the_remedy():
    with pytest.raises(MediaError, match="put the stream into a container"):
        list(PyAvVideo().decode(write("h264", "libx264", num_frames=10), [0.0]))
