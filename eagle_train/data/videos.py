"""Videos from their encoded bytes: opening them safely, and the facts that their headers tell."""

from __future__ import annotations

import io
from typing import BinaryIO, NamedTuple

import av

from eagle_train.data.media import MAX_PIXELS, check_size, reported_as

VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,m4v,h264,hevc,ivf"
"""FFmpeg demuxers that read one self-contained file. Playlists (HLS, concat, DASH) are left out: they open other
files and addresses, named by the bytes."""

WHOLE_BYTES = 1 << 22
"""A video file up to this size is read at once: that costs less than the requests for its parts."""

UNTIMED = "frames without timestamps; put the stream into a container, for example mp4"
COUNTED_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2"
"""The demuxer whose frame count is exact: that of a table with an entry per frame. Others guess, or say nothing."""


class VideoFacts(NamedTuple):
    """What the headers of a video file tell."""

    width: int
    """Pixels as shown, after rotation metadata (non-square pixels are not stretched)."""
    height: int
    duration: float
    """Seconds from the first frame to the end of the last one; 0 where nothing tells it."""
    num_frames: int
    """At least 1; what decodes may differ by a few."""


def probe_video(file: BinaryIO | bytes, *, max_pixels: int = MAX_PIXELS) -> VideoFacts:
    """Returns the header facts of a video file.

    One frame is decoded: PyAV gives the rotation of decoded frames only. Where the container has no table of frames,
    as WebM and MPEG-TS, its packets are counted, so the file is read to its end.

    Args:
        file: the bytes, or a seekable file of them.

    Raises:
        MediaError: if it is no video, ends before its frames do, or they are larger than `max_pixels`.
    """
    with reported_as("unreadable_video"):
        with open_video(file, max_pixels) as container:
            stream = video_stream(container)
            frame = next(container.decode(stream), None)
            if frame is None:
                raise ValueError("no frame can be decoded")
            if frame.pts is None:
                raise ValueError(UNTIMED)
            width, height = frame.width, frame.height
            if quarter_turns(frame) % 2:
                width, height = height, width
            is_counted = container.format.name == COUNTED_FORMATS and stream.frames > 0 and bool(stream.duration)
            if is_counted:
                _check_end(file, stream)
                return VideoFacts(width, height, float(stream.duration * stream.time_base), stream.frames)
        count, seconds = _measure_packets(file, max_pixels)
        return VideoFacts(width, height, seconds, max(1, count))


def open_video(file: BinaryIO | bytes, max_pixels: int) -> av.container.InputContainer:
    """Returns the opened container, its frame size checked before anything is decoded.

    It decodes in the calling thread: loaders have a process for each core already.
    """
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    file.seek(0)
    container = av.open(file, options={"format_whitelist": VIDEO_FORMATS})
    try:
        context = video_stream(container).codec_context
        if context is None:
            raise ValueError("this FFmpeg has no decoder for the video")
        check_size(context.width, context.height, max_pixels)
        context.thread_count = 1
    except Exception:
        container.close()
        raise
    return container


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Returns the first video stream that is no cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise ValueError(f"no video stream among {len(container.streams)} streams")


def quarter_turns(frame: av.VideoFrame) -> int:
    """Returns how often the frame is to be turned by 90 degrees counterclockwise, 0 to 3."""
    return round(frame.rotation / 90) % 4


def _check_end(file: BinaryIO | bytes, stream: av.VideoStream) -> None:
    """Raises ValueError for a file that was cut before its last frame."""
    size = len(file) if isinstance(file, bytes) else file.seek(0, io.SEEK_END)
    last = stream.index_entries[-1]
    if last.pos + last.size > size:
        raise ValueError(f"its last frame ends at byte {last.pos + last.size}, the file has {size}: it was cut")


def _measure_packets(file: BinaryIO | bytes, max_pixels: int) -> tuple[int, float]:
    """Returns the number of video packets and the seconds they span; nothing is decoded."""
    with open_video(file, max_pixels) as container:
        stream = video_stream(container)
        count, first, last, end = 0, None, None, 0
        for packet in container.demux(stream):
            if not packet.size:
                continue
            count += 1
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None:
                first = time if first is None else min(first, time)
                if last is None or time > last:
                    last, end = time, time + (packet.duration or 0)
        if first is None:
            return count, 0.0
        if end == last:  # untold: the last frame is shown for as long as the frames before it on average
            end = last + (last - first) / max(1, count - 1)
        return count, float((end - first) * stream.time_base)
