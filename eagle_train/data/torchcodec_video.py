"""Video frames by torchcodec; the only module that imports it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from eagle_train.data.media import MAX_PIXELS, reported_as
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.data.videos import COUNTED_FORMATS, open_video, video_stream

FORMATS = (COUNTED_FORMATS, "matroska,webm")
"""Containers whose key frames can be gone to exactly. In MPEG-TS, for example, a jump may end behind its aim."""

PIXEL_FORMATS = ("yuv420p", "yuvj420p")
"""Those that torchcodec makes the same RGB of as PyAV; of others it differs by rounding, see `TorchcodecVideo`."""


class Start(NamedTuple):
    """Where the first frame of a video is."""

    stream: int
    """Index among all streams of the file."""
    pts: int
    """Ticks at which it is shown."""
    tick: float
    """Seconds."""


@dataclass(frozen=True)
class TorchcodecVideo:
    """Decodes mp4 and Matroska (WebM) files of 8-bit 4:2:0 video with torchcodec, and leaves all others to PyAV.

    With the same FFmpeg both give the same frames, bit for bit. What is left to PyAV would not be: torchcodec 0.17
    chooses other rounding for 10 bits and odd sizes (up to 50 of 255 apart on noise), takes other frames of MPEG-TS,
    MPEG program streams and AVI with B frames, or none. What torchcodec does not decode, PyAV judges too: the same
    files are refused with either.

    Exact seeking reads all of a file before the first frame, so large videos of which few frames are wanted are read,
    and held in memory, whole; PyAV reads only parts of them. The version of torchcodec and the major version of its
    FFmpeg, which is the system's, are in the repr: others may give other pixels.

    Raises:
        ValueError: if torchcodec is not installed, or finds no FFmpeg.
    """

    version: str = field(init=False)
    ffmpeg: int = field(init=False)

    def __post_init__(self) -> None:
        try:
            import torchcodec
        except ImportError as error:
            raise ValueError("TorchcodecVideo needs torchcodec: pip install 'eagle-train[torchcodec]'") from error
        if torchcodec.ffmpeg_major_version is None:
            raise ValueError(
                f"torchcodec {torchcodec.__version__} finds no FFmpeg, or does not fit this torch: install FFmpeg's "
                f"shared libraries (apt-get install ffmpeg), or set data.videos to video_frames.PyAvVideo"
            )
        object.__setattr__(self, "version", torchcodec.__version__)
        object.__setattr__(self, "ffmpeg", torchcodec.ffmpeg_major_version)

    def decode(self, file: BinaryIO | bytes, seconds: Sequence[float]) -> Iterator[Image.Image]:
        """Yields the frame shown at each of `seconds`, see `video_frames.VideoDecoder`."""
        done = 0
        with reported_as("unreadable_video"):
            start = _find_start(file)
            data = b"" if start is None else _read_all(file)
        if start is not None:
            try:
                for image in _frames_at(data, start, seconds):
                    yield image
                    done += 1
            except (IndexError, RuntimeError, ValueError):  # damaged, or ends early: PyAV has the last word
                pass
        if done < len(seconds):
            yield from PyAvVideo().decode(file, seconds[done:])


def _find_start(file: BinaryIO | bytes) -> Start | None:
    """Returns where the first frame is, None for a video that torchcodec would not decode as PyAV does."""
    with open_video(file, MAX_PIXELS) as container:
        stream = video_stream(container)
        if container.format.name not in FORMATS or stream.codec_context.pix_fmt not in PIXEL_FORMATS:
            return None
        if stream.codec_context.width % 2 or stream.codec_context.height % 2:
            return None
        frame = next(container.decode(stream), None)
        if frame is None or frame.pts is None:
            return None
        return Start(stream.index, frame.pts, float(stream.time_base))


def _read_all(file: BinaryIO | bytes) -> bytes:
    """Returns the bytes of a file."""
    if isinstance(file, bytes):
        return file
    file.seek(0)
    return file.read()


def _frames_at(data: bytes, start: Start, seconds: Sequence[float]) -> Iterator[Image.Image]:
    """Yields the frame shown at each of `seconds` from the first one.

    Raises:
        IndexError, RuntimeError, ValueError: if torchcodec has no such frame.
    """
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, stream_index=start.stream, dimension_order="NHWC", num_ffmpeg_threads=1)
    for time in seconds:
        # Half a tick later no rounding matters. One time of get_frames_played_at, since get_frame_played_at goes by
        # the duration of frames, which is wrong where the rate varies.
        at = (start.pts + math.floor(time / start.tick) + 0.5) * start.tick
        found = decoder.get_frames_played_at([at])
        if found.pts_seconds.item() > at:
            raise ValueError(f"the frame at {at} s was to be found, not that of {found.pts_seconds.item()} s")
        yield Image.fromarray(np.ascontiguousarray(found.data[0].numpy()))
