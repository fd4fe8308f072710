"""Chosen frames of a video: seeks to a key frame where one lies ahead, and decodes only from there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import av
import pyarrow as pa
from av.video.reformatter import VideoReformatter
from PIL import Image

from eagle_train.data.media import MAX_PIXELS, check_size, reported_as
from eagle_train.data.videos import UNTIMED, open_video, quarter_turns, video_stream

QUARTER_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}
"""Display matrix of a video, in quarter turns counterclockwise."""

GUESSED_FORMATS = ("avi", "mpeg")
"""AVI has no timestamps, MPEG program streams not for every frame. With B frames FFmpeg guesses them, after a jump
otherwise than before."""

MISSING_SECONDS = 1.0
"""A file may end this much before its headers say so: then the last frame stands for what is missing."""

SHARED_WIDTH = 16
"""Of frames whose width in pixels is a multiple of this, swscale writes the four bytes to a pixel that Pillow holds,
and Pillow takes that memory over: a copy takes as long again, 1 ms of 1280x720 and more where its memory is new. Of
other widths swscale may leave out the last pixels of a line (66: two), as a line's end has no room for its steps."""


class VideoDecoder(Protocol):
    """What makes pictures of video files; its repr is part of a run's identity."""

    def decode(self, file: BinaryIO | bytes, seconds: Sequence[float]) -> Iterator[Image.Image]:
        """Yields the frame shown at each of `seconds`: RGB, upright, one at a time, so only one is in memory.

        That is the last frame at or before the time, or the first one of the file; its pixels are those that decoding
        everything from the start gives, whatever was left out.

        Args:
            file: the bytes, or a seekable file of them.
            seconds: increasing times from the first frame, see `frames.shown_seconds`.

        Raises:
            MediaError: if the video cannot be decoded up to a time, or ends before it.
        """


@dataclass(frozen=True)
class PyAvVideo:
    """PyAV and the FFmpeg in its wheels. Of a file only the parts that are needed are read."""

    def decode(self, file: BinaryIO | bytes, seconds: Sequence[float]) -> Iterator[Image.Image]:
        """Yields the frame shown at each of `seconds`, see `VideoDecoder`."""
        with reported_as("unreadable_video"):
            playback = Playback(file, MAX_PIXELS)
        try:
            shown, image = None, None
            for time in seconds:
                with reported_as("unreadable_video"):
                    frame = playback.frame_at(time)
                    if frame is not shown:
                        shown, image = frame, playback.to_image(frame)
                yield image
        finally:
            playback.close()


class Playback:
    """A video that is played from one wanted time to the next, or jumps there.

    Timestamps (`pts`, ticks of the stream's time base) are those of frames as they are shown. After a jump, a frame
    counts only from the first key frame on: what is shown before that (the leading frames of an open group of
    pictures) needs frames from before the jump. If no such key frame is at or before the wanted time, the jump goes
    further back, in the end to the start of the file.

    Args:
        file: the bytes, or a seekable file of them.
        max_pixels: frames with more are refused.

    Raises:
        ValueError, FFmpegError: if no frame can be decoded.
    """

    def __init__(self, file: BinaryIO | bytes, max_pixels: int) -> None:
        self._file = file
        self._max_pixels = max_pixels
        self._reformatter = VideoReformatter()
        self._exact_from = self._unseen_before = -math.inf
        self._open()
        self._origin = self._shown.pts
        self._tick = float(self._stream.time_base)
        # Tables of mp4 hold decoding times, which run ahead of the times shown by what reordering needs.
        entries = self._stream.index_entries
        self._lead = max(0, self._origin - entries[0].timestamp) if len(entries) else 0
        self._has_table = self._stream.frames > 0  # of all frames; other containers list what was read so far
        is_guessed = self._container.format.name in GUESSED_FORMATS and self._stream.codec_context.has_b_frames
        self._can_jump = not is_guessed
        self._least_jump = 0
        self._margin = _passing_over(self._stream)

    def frame_at(self, seconds: float) -> av.VideoFrame:
        """Returns the frame shown at a time, in seconds from the first frame."""
        ticks = self._origin + math.floor(seconds / self._tick)
        self._exact_from = ticks - self._margin
        if ticks < self._shown.pts or self._is_worth_a_jump(ticks):
            self._jump(ticks)
        self._play_to(ticks)
        if self._shown.pts < self._exact_from:  # the one to show may be among those passed over: a gap in the video
            self._margin, self._exact_from = math.inf, -math.inf
            self._jump(ticks)
            self._play_to(ticks)
        missing = ticks - self._shown.pts - (self._shown.duration or 0)
        if self._next is None and missing > MISSING_SECONDS / self._tick:
            end = (self._shown.pts - self._origin) * self._tick
            raise ValueError(f"its last frame is at {end:.3f} s, another was to be at {seconds:.3f} s: it was cut")
        return self._shown

    def to_image(self, frame: av.VideoFrame) -> Image.Image:
        """Returns the frame as shown, RGB."""
        # One thread: by default swscale starts as many as there are cores, in each worker.
        is_shared = frame.width % SHARED_WIDTH == 0
        (plane,) = self._reformatter.reformat(frame, format="rgb0" if is_shared else "rgb24", threads=1).planes
        size = frame.width, frame.height
        if is_shared:
            pixels = pa.Array.from_buffers(pa.uint32(), frame.width * frame.height, [None, pa.py_buffer(plane)])
            image = Image.fromarrow(pixels, "RGB", size)
        else:
            image = Image.frombuffer("RGB", size, plane, "raw", "RGB", plane.line_size, 1)
        turns = quarter_turns(frame)
        return image.transpose(QUARTER_TURNS[turns]) if turns else image

    def close(self) -> None:
        """Closes the container, not the file."""
        self._container.close()

    def _open(self) -> None:
        """Starts at the first frame."""
        self._container = open_video(self._file, self._max_pixels)
        try:
            self._stream = video_stream(self._container)
            self._frames = self._decoded()
            self._shown = self._decode()
            if self._shown is None:
                raise ValueError("no frame can be decoded")
            self._next = self._decode(after=self._shown.pts)
        except Exception:
            self._container.close()
            raise

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Yields frames in the order shown; those before `_exact_from` that no other needs are passed over."""
        context = self._stream.codec_context
        decode = context.decode
        was_early = False
        context.skip_frame = "DEFAULT"
        for packet in self._container.demux(self._stream):  # of long videos, tens of thousands: each call counts
            pts = packet.pts
            is_early = pts is not None and pts < self._exact_from
            if is_early != was_early:  # to set it costs as much as a small frame
                context.skip_frame = "NONREF" if is_early else "DEFAULT"
                was_early = is_early
            for frame in decode(packet):
                if frame.pts is None or frame.pts >= self._unseen_before:
                    yield frame

    def _decode(self, after: float = -math.inf) -> av.VideoFrame | None:
        """Returns the next frame that is shown later than `after`, None after the last one."""
        for frame in self._frames:
            check_size(frame.width, frame.height, self._max_pixels)
            if frame.pts is None:
                raise ValueError(UNTIMED)
            if frame.pts > after:
                return frame
        return None

    def _play_to(self, ticks: int) -> None:
        """Decodes until the frame shown at `ticks` is known: until the next one is shown later, or there is none."""
        self._unseen_before = self._exact_from  # most frames are decoded for others only, and dropped where they come
        while self._next is not None and self._next.pts <= ticks:
            self._shown, self._next = self._next, self._decode(after=self._next.pts)
        self._unseen_before = -math.inf

    def _is_worth_a_jump(self, ticks: int) -> bool:
        """Returns whether a key frame lies between what was decoded last and `ticks`, as far as is known."""
        if not self._can_jump or self._next is None or ticks - self._next.pts <= self._least_jump:
            return False
        entries = self._stream.index_entries
        if self._has_table or (len(entries) and entries[-1].timestamp + self._lead >= ticks):
            at = entries.search_timestamp(ticks - self._lead, backward=True)
            return at >= 0 and entries[at].timestamp + self._lead > self._next.pts
        return True

    def _jump(self, ticks: int) -> None:
        """Goes to a key frame at or before `ticks`."""
        position, back = self._shown.pts, 0
        while self._can_jump and (target := ticks - back) > self._origin:
            try:
                self._container.seek(target, stream=self._stream)
                self._frames = self._decoded()
                if self._find_key_frame(ticks):
                    break
            except av.error.FFmpegError:
                pass  # damaged, or not to be decoded without what comes before: further back it may be
            back = max(2 * back, self._lead + round(1 / self._tick))
        else:
            self._container.close()
            self._open()
        if self._shown.pts <= position <= ticks:  # in vain: it had been decoded already
            self._least_jump = 2 * (ticks - self._shown.pts)

    def _find_key_frame(self, ticks: int) -> bool:
        """Decodes up to the first key frame after a jump; returns whether it is at or before `ticks`."""
        while (frame := self._decode()) is not None and frame.pts <= ticks:
            if frame.key_frame:
                self._shown, self._next = frame, self._decode(after=frame.pts)
                return True
        return False


def _passing_over(stream: av.VideoStream) -> float:
    """Returns how long before a wanted time, in ticks, frames that no other needs may be passed over.

    Half of the frames that x264 makes, which saves half of the time. Only of H.264 it is sure that no picture refers
    to them (`nal_ref_idc` 0, ITU-T H.264 7.4.1); in HEVC those of higher temporal layers may.
    """
    if stream.codec_context.name != "h264" or not stream.average_rate:
        return math.inf
    return math.ceil(2 / (stream.average_rate * stream.time_base))
