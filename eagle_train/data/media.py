"""Images and videos from their encoded bytes: sizes from headers, pixels, chosen frames.

The bytes come from the web, so whatever a parser raises on them means one thing: a `MediaError`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Largest image or video frame that is opened. Twice `PIL.Image.MAX_IMAGE_PIXELS`, where Pillow 13 itself refuses."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "ICO")
"""Pillow's raster formats. Left out are those that start other programs (EPS runs Ghostscript) or are no pictures."""

VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,m4v,h264,hevc,ivf"
"""FFmpeg demuxers that read one self-contained file. Playlists (HLS, concat, DASH) are left out: they open other
files and addresses, named by the bytes."""

Reason = Literal["unreadable_image", "unreadable_video"]

# EXIF tag 0x0112 (CIPA DC-008, 4.6.4): what brings the stored rows upright.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}
"""Display matrix of a video, in quarter turns counterclockwise."""


class MediaError(ValueError):
    """Bytes that are no usable image or video.

    Args:
        reason: the word to count it by.
        detail: what exactly is wrong.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


def probe_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns the (width, height) of an image in pixels, upright by its EXIF orientation; no pixel is decoded.

    Args:
        max_pixels: larger images are refused; Pillow's own limit holds besides.

    Raises:
        MediaError: if it is no image, has no pixels or too many.
    """
    with _reported_as("unreadable_image"), _open_image(data, max_pixels) as image:
        width, height = image.size
        return (height, width) if _orientation(image, data) >= 5 else (width, height)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the image as RGB: upright, the first picture of animations, transparency over white.

    16-bit grey keeps its upper byte.

    Raises:
        MediaError: if the bytes are no image, are cut short, or hold pixels without an agreed white (32-bit).
    """
    with _reported_as("unreadable_image"), _open_image(data, max_pixels) as image:
        orientation = _orientation(image, data)
        rgb = _to_rgb(image)
        return rgb.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else rgb


def probe_video(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int, float, int]:
    """Returns (width, height, duration, num_frames) of a video.

    Width and height are pixels as shown, after rotation metadata (non-square pixels are not stretched).
    Duration is in seconds, 0 where nothing tells it. The number of frames is the container's count, or the
    number of packets where it has none (WebM), at least 1; what decodes may differ by a few.

    One frame is decoded: PyAV gives the rotation of decoded frames only.

    Raises:
        MediaError: if the bytes are no video, or its frames are larger than `max_pixels`.
    """
    with _reported_as("unreadable_video"):
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
        return width, height, seconds, max(1, count)


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
    with _reported_as("unreadable_video"):
        with _open_video(data, max_pixels) as container:
            expected = _video_stream(container).frames
        if expected <= 0:
            expected, _ = _measure_packets(data, max_pixels)
        frames, total = _decode_chosen(data, num_frames, expected, max_pixels)
        if total != expected:  # the container was wrong, or counts frames that are never shown
            frames, _ = _decode_chosen(data, num_frames, total, max_pixels)
        return frames


@contextmanager
def _reported_as(reason: Reason) -> Iterator[None]:
    """Turns whatever Pillow or FFmpeg raises on hostile bytes into MediaError, and keeps their warnings quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # both raise OSError, SyntaxError, struct.error, IndexError, ... by the bytes
        raise MediaError(reason, f"{type(error).__name__}: {error}") from error


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Returns the image with its header read."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:  # its text holds a memory address, so no two reports would be equal
        raise ValueError(f"{len(data)} bytes that start with {data[:12]!r} are no picture Pillow knows") from error
    _check_size(*image.size, max_pixels)
    if image.format == "PNG" and b"IEND" not in data:  # Pillow fills the missing pixels of small ones
        raise ValueError(f"the PNG is cut short: {len(data)} bytes without the IEND chunk")
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises ValueError for a picture that is empty or would not fit in memory."""
    if width < 1 or height < 1 or width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels; usable are 1 to {max_pixels}")


def _orientation(image: Image.Image, data: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 where there is none, or the EXIF block is damaged."""
    if image.format == "TIFF":  # Pillow turns TIFF itself, its size included
        return 1
    try:
        # PNG's own getexif decodes all pixels in search of an eXIf chunk behind them.
        exif = image.getexif() if image.format != "PNG" or b"eXIf" in data else Image.Image.getexif(image)
        orientation = exif.get(0x0112, 1)
    except Exception:  # a damaged EXIF block raises nearly anything; viewers show such pictures as stored
        return 1
    return orientation if orientation in ORIENTATIONS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Returns the pixels as RGB, as stored (not turned)."""
    image.load()
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no agreed white; convert the file to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError(f"32-bit grey levels {levels.min()} to {levels.max()}; convert the file to 16 bits")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _open_video(data: bytes, max_pixels: int) -> av.container.InputContainer:
    """Returns the opened container, its frame size checked before anything is decoded."""
    container = av.open(io.BytesIO(data), options={"format_whitelist": VIDEO_FORMATS})
    try:
        context = _video_stream(container).codec_context
        if context is None:
            raise ValueError("this FFmpeg has no decoder for the video")
        _check_size(context.width, context.height, max_pixels)
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
            _check_size(frame.width, frame.height, max_pixels)
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
