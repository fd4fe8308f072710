"""How many frames and tiles the media of a sample get: policies, pure functions of header facts and a budget of tokens.

`EachByItself` gives every medium what it asks for, however long the sample becomes; with InternVL's `SharedTiles` the
images share a number of tiles. `AutomaticDegradeSampling` is Eagle 2.5's: text is paid first, whole; then frames; then
tiles, as many as the row has left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from eagle_train.data.frames import FrameCount
from eagle_train.types import Media, MediaPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A medium that asks for tokens."""

    medium: Media
    tiles: Callable[..., MediaPlan] | None
    """The tiling's choice for an image, called with `max_tiles`; None for a video or document."""
    frames: Callable[..., MediaPlan] | None
    """The tiling's choice for so many frames or pages, also with `max_tiles` of each; None for an image."""
    tokens: Callable[[MediaPlan], int]
    """All that it takes in the sequence under a plan: visual tokens and its own text, exactly."""
    at_least: Callable[[MediaPlan], np.ndarray] | None = None
    """For a plan of n frames, (n + 1,) int64: what 0, 1, ..., n of them take at least, non-decreasing."""


class Degrade(Protocol):
    """What becomes of the media of a sample within a budget."""

    by_budget: ClassVar[bool]
    """Whether the choice depends on the budget."""

    def plan(self, media: Sequence[Candidate], budget: int | None) -> list[MediaPlan]:
        """Returns the plan of each medium: one that fits if there is any, else the smallest.

        Args:
            budget: tokens that the text leaves to all media together; None: no limit.
        """


@dataclass(frozen=True, kw_only=True)
class EachByItself:
    """Every image gets the tiles of its tiling, every video the frames of its rate, every document all its pages.

    Args:
        frames: how many frames a video gives.
    """

    frames: FrameCount
    by_budget: ClassVar[bool] = False

    def plan(self, media: Sequence[Candidate], budget: int | None) -> list[MediaPlan]:
        """Returns the plan of each medium; the budget does not matter."""
        del budget
        return [each.tiles() if each.tiles else each.frames(asked(each.medium, self.frames)) for each in media]


@dataclass(frozen=True, kw_only=True)
class SharedTiles:
    """InternVL: of n images in a sample each gets `max(1, max_tiles // n)` tiles at most, whatever the budget.

    Args:
        max_tiles: the most tiles of one image alone; the thumbnail is not counted.
        frames: how many frames a video gives; a document gives all its pages.

    Raises:
        ValueError: for a number below 1.

    Source: OpenGVLab/InternVL, `internvl/train/dataset.py` (facts only).
    """

    max_tiles: int
    frames: FrameCount
    by_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles {self.max_tiles} must be at least 1")

    def plan(self, media: Sequence[Candidate], budget: int | None) -> list[MediaPlan]:
        """Returns the plan of each medium; the budget does not matter."""
        del budget
        share = max(1, self.max_tiles // max(1, sum(each.tiles is not None for each in media)))
        return [
            each.tiles(max_tiles=share) if each.tiles else each.frames(asked(each.medium, self.frames))
            for each in media
        ]


@dataclass(frozen=True, kw_only=True)
class AutomaticDegradeSampling:
    """First frames, one tile each, up to what is asked for; then tiles of images, one limit for all of the sample.

    More budget never gives fewer frames of a video, pages of a document or tiles of an image. So images get more than
    the smallest limit only where all videos and documents have what they ask for: otherwise a little more budget would
    buy a frame, and the images would lose their tiles to pay for it.

    Args:
        frames: asked of a video; `min_frames` is the least that it must get.
        min_pages: the least that a document must get; it asks for all.
        tile_caps: limits on the tiles of an image, of which the largest that fits is taken.

    Raises:
        ValueError: for numbers below 1.

    Source: Eagle 2.5 (arXiv 2504.15271), 3.2.1. It leaves open how several videos share: here all get the same part
    of what they ask for, to the frame.
    """

    frames: FrameCount
    min_pages: int = 1
    tile_caps: Sequence[int] = (12, 8, 6, 4, 2, 1)
    by_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tile_caps or min(*self.tile_caps, self.min_pages) < 1:
            raise ValueError(f"tile_caps {list(self.tile_caps)} and min_pages {self.min_pages} must be at least 1")

    def plan(self, media: Sequence[Candidate], budget: int | None) -> list[MediaPlan]:
        """Returns the plan of each medium; the smallest of all if nothing fits."""
        room = sys.maxsize if budget is None else budget
        stills = {place: image_plans(each, self.tile_caps) for place, each in enumerate(media) if each.tiles}
        moving = [place for place, each in enumerate(media) if not each.tiles]
        room -= sum(plans[0][1] for plans in stills.values())
        least = [self.least(media[place].medium) for place in moving]
        most = [asked(media[place].medium, self.frames) for place in moving]
        full = [media[place].frames(count) for place, count in zip(moving, most, strict=True)]
        counts, used = share_frames([media[place] for place in moving], full, least, room)
        chosen = {
            place: replace(plan, num_frames=count) for place, plan, count in zip(moving, full, counts, strict=True)
        }
        room -= used
        level = 0
        if counts == most:
            added = [[tokens - plans[0][1] for _, tokens in plans] for plans in stills.values()]
            fits = [sum(tokens) <= room for tokens in zip(*added, strict=True)]  # true up to some limit, then false
            level = max(0, sum(fits) - 1)
        chosen |= {place: plans[level][0] for place, plans in stills.items()}
        return [chosen[place] for place in range(len(media))]

    def least(self, medium: Media) -> int:
        """Returns the fewest frames or pages that a medium must get."""
        if medium.kind == "document":
            return min(self.min_pages, medium.num_frames)
        return min(fewest(medium, self.frames), asked(medium, self.frames))


def asked(medium: Media, frames: FrameCount) -> int:
    """Returns the frames that a video, or the pages that a document, asks for: of frames without times, all.

    Args:
        frames: what a video asks for whose record does not say it.
    """
    if medium.kind == "document":
        return medium.num_frames
    own = frames.of(medium)
    if not medium.duration:
        return min(medium.num_frames, own.max_frames)
    return own.num_frames(medium.duration, medium.num_frames)


def fewest(video: Media, frames: FrameCount) -> int:
    """Returns the fewest frames that a policy may leave of a video, be it more than it asks for.

    A record that asks for a number of frames asks for no more than others may lose where a row is full.
    """
    return video.min_frames or frames.min_frames


def image_plans(image: Candidate, caps: Sequence[int]) -> list[tuple[MediaPlan, int]]:
    """Returns an image's plan and tokens under each limit on its tiles, from the lowest on.

    A tiling may choose fewer tiles under a higher limit, if that grid suits the image better. Then the choice of the
    lower one stays, so that tokens never decrease; of equally long ones the higher limit's is taken.
    """
    plans: list[tuple[MediaPlan, int]] = []
    for cap in sorted(set(caps)):
        plan = image.tiles(max_tiles=cap)
        tokens = image.tokens(plan)
        plans.append((plan, tokens) if not plans or tokens >= plans[-1][1] else plans[-1])
    return plans


def share_frames(
    media: Sequence[Candidate], full: Sequence[MediaPlan], least: Sequence[int], room: int
) -> tuple[list[int], int]:
    """Returns the frames that each video or document gets, and the tokens of all; the least of each if nothing fits.

    Args:
        full: the plan of each with all frames that it asks for; fewer frames are cut alike.
        least: the fewest frames of each.
        room: tokens for all.

    There is one order in which frames are added to the least of each medium, whatever the budget: to the one that has
    the smallest part of what it asks for, of equal ones to the first. The allocation is the longest start of that order
    that fits. So more room never takes a frame away, and equal media differ by one frame at most.
    """
    order = frame_order(least, [plan.num_frames for plan in full])
    added = len(order)
    while True:
        more = np.bincount(order[:added], minlength=len(media)).tolist()
        counts = [a + b for a, b in zip(least, more, strict=True)]
        plans = [replace(plan, num_frames=count) for plan, count in zip(full, counts, strict=True)]
        total = sum(each.tokens(plan) for each, plan in zip(media, plans, strict=True))
        if total <= room or not added:
            return counts, total
        # One frame fewer may take more tokens, as all labels change ("10.53" has more than "8.5"), so that the longest
        # start that fits is not found by bisection. It is no longer than the longest that may fit.
        bounds = [each.at_least(plan) for each, plan in zip(media, plans, strict=True)]
        steps = np.empty(added, np.int64)
        for place, (bound, low, high) in enumerate(zip(bounds, least, counts, strict=True)):
            steps[order[:added] == place] = np.diff(bound[low : high + 1])
        smallest = sum(int(bound[low]) for bound, low in zip(bounds, least, strict=True))
        added = int(np.searchsorted(smallest + np.cumsum(steps[:-1]), room, side="right"))


def frame_order(least: Sequence[int], most: Sequence[int]) -> np.ndarray:
    """Returns (k,) int64: which medium gets each frame beyond the least, until all have the most."""
    owners = [np.full(high - low, place) for place, (low, high) in enumerate(zip(least, most, strict=True))]
    shares = [np.arange(low, high) / high for low, high in zip(least, most, strict=True)]
    if not owners:
        return np.empty(0, np.int64)
    owner = np.concatenate(owners)
    return owner[np.lexsort((owner, np.concatenate(shares)))]  # equal fractions are equal floats
