"""How many frames of a video enter the sequence, from its header alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameRate:
    """A target rate within bounds: `clamp(duration * fps, min_frames, max_frames)`, never more than there are.

    Args:
        fps: frames per second of video.
        min_frames, max_frames: bounds on the number of frames.
    """

    fps: float = 2.0
    min_frames: int = 1
    max_frames: int = 8

    def num_frames(self, duration: float, available: int) -> int:
        """Returns the number of frames for a video of `duration` seconds that has `available` frames."""
        wanted = max(self.min_frames, min(self.max_frames, round(duration * self.fps)))
        return max(1, min(wanted, available))
