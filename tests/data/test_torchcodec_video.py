"""TorchcodecVideo: PyAV's frames bit for bit, PyAV's verdict on damage."""

import builtins
import io

import av
import numpy as np
import pytest

from eagle_train.data import torchcodec_video
from eagle_train.data.frames import shown_seconds
from eagle_train.data.media import MediaError
from eagle_train.data.retries import StorageError
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.torchcodec_video import TorchcodecVideo
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.data.videos import probe_video
from eagle_train.types import Media
from tests.data.test_video_faults import BAD, NOISE, Failing
from tests.data.test_video_frames import FILES, X264, made, write

BY_TORCHCODEC = {
    "b frames", "fragmented", "open gop", "open gop mkv", "intra refresh", "variable rate", "variable rate mkv",
    "starts late", "starts late mkv", "mpeg4 b frames", "vp8", "vp9", "vp9 without cues", "hevc",
}  # fmt: skip


@pytest.fixture
def decoder():
    torchcodec = pytest.importorskip("torchcodec")
    if torchcodec.ffmpeg_major_version is None:
        pytest.skip("torchcodec finds no FFmpeg")
    return TorchcodecVideo()


@pytest.fixture
def left(monkeypatch):
    """Files that were left to PyAV."""
    found = []

    class Counted(PyAvVideo):
        def decode(self, file, seconds):
            found.append(file)
            return super().decode(file, seconds)

    monkeypatch.setattr(torchcodec_video, "PyAvVideo", Counted)
    return found


def pixels(images):
    return [np.asarray(image) for image in images]


@pytest.mark.parametrize("name", FILES)
def test_frames_equal_those_of_pyav(name, decoder, left):
    data = made(name)
    media = Media(kind="video", **probe_video(data)._asdict())
    for wanted in (1, 7, 40):
        seconds = shown_seconds(media, wanted)
        ours, theirs = pixels(decoder.decode(data, seconds)), pixels(PyAvVideo().decode(data, seconds))
        assert len(ours) == wanted
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert bool(left) == (name not in BY_TORCHCODEC)


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt2020nc"])
@pytest.mark.parametrize("levels", ["off", "on"])
def test_colours_equal_those_of_pyav(matrix, levels, decoder, left):
    options = {"x264-params": f"colormatrix={matrix}:fullrange={levels}"}
    data, seconds = write("mp4", "libx264", num_frames=50, size=(70, 46), codec_options=X264 | options), [0.0, 0.9, 1.9]
    ours, theirs = pixels(decoder.decode(data, seconds)), pixels(PyAvVideo().decode(data, seconds))
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True)) and not left


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_frames_equal_those_of_pyav(degrees, decoder, left):
    buffer = io.BytesIO()
    with av.open(io.BytesIO(NOISE)) as source, av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(degrees)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data, seconds = buffer.getvalue(), [0.0, 2.5, 5.9]
    ours, theirs = pixels(decoder.decode(data, seconds)), pixels(PyAvVideo().decode(data, seconds))
    assert ours[0].shape == ((64, 48, 3) if degrees % 180 else (48, 64, 3)) and not left
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
    upright = pixels(PyAvVideo().decode(NOISE, seconds))
    assert not any(a.shape == b.shape and (a == b).all() for a, b in zip(ours, upright, strict=True))


@pytest.mark.parametrize("name", BAD)
def test_the_same_files_are_refused(name, decoder):
    data, reason = BAD[name]
    messages = []
    for each in (decoder, PyAvVideo()):
        with pytest.raises(MediaError) as error:
            list(each.decode(data, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.9]))
        assert error.value.reason == reason
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_time_after_the_end_is_judged_by_pyav(decoder):
    data = made("b frames")  # 6 seconds
    *_, last = pixels(decoder.decode(data, [1.0, 6.9]))
    np.testing.assert_array_equal(last, pixels(PyAvVideo().decode(data, [5.99]))[0])
    with pytest.raises(MediaError, match=r"last frame is at 5.960 s, another was to be at 7.500 s"):
        list(decoder.decode(data, [1.0, 7.5]))


def test_storage_that_does_not_answer_is_no_defect_of_a_video(decoder):
    member, needed = Member("0.mp4", 0, len(NOISE)), Failing(NOISE, 10**6)
    expected = pixels(decoder.decode(NOISE, [0.0, 3.0]))
    streamed = pixels(decoder.decode(ShardReader(needed).open(member), [0.0, 3.0]))
    assert all((a == b).all() for a, b in zip(streamed, expected, strict=True))
    for reads in range(10**6 - needed.left):
        with pytest.raises(StorageError):
            list(decoder.decode(ShardReader(Failing(NOISE, reads)).open(member), [0.0, 3.0]))


def test_library_and_ffmpeg_are_part_of_the_identity(decoder):
    torchcodec = pytest.importorskip("torchcodec")
    facts = f"version='{torchcodec.__version__}', ffmpeg={torchcodec.ffmpeg_major_version}"
    assert repr(decoder) == f"TorchcodecVideo({facts})" != repr(PyAvVideo())


def test_what_is_not_installed_is_named_with_the_remedy(monkeypatch):
    imported = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "torchcodec":
            raise ImportError(name)
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'eagle-train\[torchcodec\]'"):
        TorchcodecVideo()
