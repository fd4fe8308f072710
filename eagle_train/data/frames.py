"""Which frames of a video enter the sequence, and when they are shown: pure functions of its header facts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from eagle_train.types import Media


class FrameCount(Protocol):
    """How many frames a video asks for."""

    min_frames: int
    max_frames: int

    def num_frames(self, duration: float, available: int) -> int:
        """Returns the number of frames for a video of `duration` seconds that has `available` frames."""

    def of(self, media: Media) -> FrameCount:
        """Returns the same with the rate, number or bounds that the record of a video asks for, if it does.

        Where a lower bound is above an upper one, the upper counts.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameRate:
    """A target rate within bounds: `clamp(duration * fps, min_frames, max_frames)`, never more than there are.

    Args:
        fps: frames per second of video.
        min_frames, max_frames: bounds on the number of frames.

    Raises:
        ValueError: for a rate that is not above 0, or bounds that leave no number.
    """

    fps: float = 2.0
    min_frames: int = 1
    max_frames: int = 8

    def __post_init__(self) -> None:
        if not self.fps > 0 or not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"fps {self.fps}, min_frames {self.min_frames} and max_frames {self.max_frames} choose no frames; "
                f"fps is above 0, and 1 <= min_frames <= max_frames"
            )

    def num_frames(self, duration: float, available: int) -> int:
        """Returns the number of frames for a video of `duration` seconds that has `available` frames."""
        wanted = max(self.min_frames, round(min(self.max_frames, duration * self.fps)))
        return max(1, min(wanted, available))

    def of(self, media: Media) -> FrameRate:
        """Returns the rate that the record of a video asks for, see `FrameCount`."""
        if media.nframes:
            return replace(self, min_frames=media.nframes, max_frames=media.nframes)
        most = media.max_frames or self.max_frames
        least = min(media.min_frames or self.min_frames, most)
        return replace(self, fps=media.fps or self.fps, min_frames=least, max_frames=most)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvenFrameRate:
    """A target rate whose number of frames is even, for models that see frames two by two.

    Of a duration times the rate, kept between the bounds and below the number of frames, the largest even number.

    Args:
        fps: frames per second of video.
        min_frames: rounded up to an even number.
        max_frames: rounded down to one.

    Raises:
        ValueError: for a rate that is not above 0, or bounds that leave no even number.

    Source: qwen-vl-utils, `smart_nframes`. It refuses a video of a single frame; here that is shown, doubled by the
    tile that holds it.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def __post_init__(self) -> None:
        if not self.fps > 0 or not 1 <= self.min_frames + self.min_frames % 2 <= self.max_frames - self.max_frames % 2:
            raise ValueError(
                f"fps {self.fps}, min_frames {self.min_frames} and max_frames {self.max_frames} choose no frames; "
                f"fps is above 0, and there is an even number from min_frames to max_frames"
            )

    def num_frames(self, duration: float, available: int) -> int:
        """Returns the number of frames for a video of `duration` seconds that has `available` frames."""
        least, most = self.min_frames + self.min_frames % 2, self.max_frames - self.max_frames % 2
        wanted = min(max(duration * self.fps, least), most, available)
        return max(int(wanted) // 2 * 2, min(2, available))

    def of(self, media: Media) -> EvenFrameRate:
        """Returns the rate that the record of a video asks for, see `FrameCount`.

        An odd number of frames becomes the even one beside it that is a multiple of four. Of a limit of one frame
        there are two: a tile holds as many.
        """
        if media.nframes:
            count = max(2, round(media.nframes / 2) * 2)
            return replace(self, min_frames=count, max_frames=count)
        most = max(2, (media.max_frames or self.max_frames) // 2 * 2)
        least = min(media.min_frames or self.min_frames, most)
        return replace(self, fps=media.fps or self.fps, min_frames=least, max_frames=most)


def frame_indices(total: int, num_frames: int) -> list[int]:
    """Returns which of `total` frames or pages are taken: evenly spaced, the first and the last among them.

    Of more than there are, some come twice; a single one is the first.

    Raises:
        ValueError: if either number is less than 1.

    Source: Eagle 2.5's `round(linspace(0, total - 1, n))`, halves to the even number.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"{num_frames} of {total} frames; both numbers must be at least 1")
    return np.round(np.linspace(0, total - 1, num_frames)).astype(int).tolist()


def label_seconds(media: Media, num_frames: int) -> list[float]:
    """Returns what the labels of the chosen frames say: seconds from the start of the clip, 0 for the first frame."""
    seconds = media.duration / media.num_frames
    return [index * seconds for index in frame_indices(media.num_frames, num_frames)]


def shown_seconds(media: Media, num_frames: int) -> list[float]:
    """Returns the times at which the chosen frames are shown, in seconds from the first frame of the file.

    Each is in the middle of its share of the clip, so that a frame is found whatever the rounding of timestamps, and
    what a video of variable rate shows is well defined: the frame at that time, not the one of that number.
    """
    seconds = media.duration / media.num_frames
    return [media.start + (index + 0.5) * seconds for index in frame_indices(media.num_frames, num_frames)]


def clip_bounds(start: float, end: float, duration: float) -> tuple[float, float]:
    """Returns the part of start to end that a file of `duration` seconds has; an `end` of 0 is the end of the file.

    Raises:
        ValueError: if there is none.
    """
    first, last = max(0.0, start), min(end or duration, duration)
    if not first < last:
        raise ValueError(f"the clip from {start} s to {end or duration} s has nothing of a file of {duration} s")
    return first, last


def clip_frames(start: float, end: float, duration: float, num_frames: int) -> int:
    """Returns the frames of a part of a file of `duration` seconds and `num_frames` frames; at least 1."""
    return max(1, round(num_frames * (end - start) / duration))
