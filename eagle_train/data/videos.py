"""Videos from their encoded bytes: header facts, chosen frames."""

from __future__ import annotations

import io
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from eagle_train.data.media import MAX_PIXELS, check_size, reported_as

VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,m4v,h264,hevc,ivf"
"""FFmpeg demuxers that read one self-contained file. Playlists (HLS, concat, DASH) are left out: they open other
files and addresses, named by the bytes."""

QUARTER_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}
"""Display matrix of a video, in quarter turns counterclockwise."""


class VideoFacts(NamedTuple):
    """What the headers of a video file tell."""

    width: int
    height: int
    duration: float
    num_frames: int


def probe_video(data: bytes, *, max_pixels: int = MAX_PIXELS) -> VideoFacts:
    """Returns the header facts of a video.

    Width and height are pixels as shown, after rotation metadata (non-square pixels are not stretched).
    Duration is in seconds, 0 where nothing tells it. The number of frames is the container's count, or the
    number of packets where it has none (WebM), at least 1; what decodes may differ by a few.

    One frame is decoded: PyAV gives the rotation of decoded frames only.

    Raises:
        MediaError: if the bytes are no video, or its frames are larger than `max_pixels`.
    """
    with reported_as("unreadable_video"):
        with _open_video(data, max_pixels) as container:
            stream = _video_stream(container)
            frame = next(container.decode(stream), None)
            if frame is None:
                raise ValueError("no frame can be decoded")
            width, height = frame.width, frame.height
            if _quarter_turns(frame) % 2:
                width, height = height, width
            seconds = _header_seconds(container, stream)
            count = stream.frames
        if count <= 0 or seconds <= 0:
            packets, packet_seconds = _measure_packets(data, max_pixels)
            count, seconds = (count if count > 0 else packets), (seconds if seconds > 0 else packet_seconds)
        return VideoFacts(width, height, seconds, max(1, count))


def decode_frames(data: bytes, num_frames: int, *, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """Returns exactly `num_frames` RGB frames, upright, evenly spaced over those that can be decoded.

    Frame i is number `round(linspace(0, total - 1, num_frames)[i])`: the first and the last are always among
    them, and a video with fewer frames repeats some.

    Raises:
        ValueError: if `num_frames` < 1.
        MediaError: if the video cannot be decoded to its end.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; a video needs at least 1 frame")
    with reported_as("unreadable_video"):
        with _open_video(data, max_pixels) as container:
            expected = _video_stream(container).frames
        if expected <= 0:
            expected, _ = _measure_packets(data, max_pixels)
        frames, total = _decode_chosen(data, num_frames, expected, max_pixels)
        if total != expected:  # the container was wrong, or counts frames that are never shown
            frames, _ = _decode_chosen(data, num_frames, total, max_pixels)
        return frames


def _open_video(data: bytes, max_pixels: int) -> av.container.InputContainer:
    """Returns the opened container, its frame size checked before anything is decoded."""
    container = av.open(io.BytesIO(data), options={"format_whitelist": VIDEO_FORMATS})
    try:
        context = _video_stream(container).codec_context
        if context is None:
            raise ValueError("this FFmpeg has no decoder for the video")
        check_size(context.width, context.height, max_pixels)
    except Exception:
        container.close()
        raise
    return container


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Returns the first video stream that is no cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise ValueError(f"no video stream among {len(container.streams)} streams")


def _header_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Returns the duration that the headers give, in seconds; 0 where they give none."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else 0.0


def _measure_packets(data: bytes, max_pixels: int) -> tuple[int, float]:
    """Returns the number of video packets and the seconds they span; nothing is decoded."""
    with _open_video(data, max_pixels) as container:
        stream = _video_stream(container)
        packets = [packet for packet in container.demux(stream) if packet.size]
        starts = [packet.pts for packet in packets if packet.pts is not None]
        if not starts:
            return len(packets), 0.0
        ticks = max(starts) - min(starts)
        # The last frame is shown for as long as the frames before it on average.
        return len(packets), float(ticks * stream.time_base) * len(starts) / max(1, len(starts) - 1)


def _decode_chosen(data: bytes, num_frames: int, total: int, max_pixels: int) -> tuple[list[Image.Image], int]:
    """Returns the frames chosen as if there were `total`, and how many there really are."""
    chosen = np.round(np.linspace(0, total - 1, num_frames)).astype(int).tolist()
    wanted = set(chosen)
    kept: dict[int, Image.Image] = {}
    found = 0
    with _open_video(data, max_pixels) as container:
        for frame in container.decode(_video_stream(container)):
            check_size(frame.width, frame.height, max_pixels)
            if found in wanted:
                kept[found] = _upright(frame)
            found += 1
    if not found:
        raise ValueError("no frame can be decoded")
    return [kept[index] for index in chosen if index in kept], found


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Returns how often the frame is to be turned by 90 degrees counterclockwise, 0 to 3."""
    return round(frame.rotation / 90) % 4


def _upright(frame: av.VideoFrame) -> Image.Image:
    """Returns the frame as shown, RGB."""
    image = frame.to_image()
    turns = _quarter_turns(frame)
    return image.transpose(QUARTER_TURNS[turns]) if turns else image
