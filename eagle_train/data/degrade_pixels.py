"""Automatic Degrade Sampling for pictures of native resolution: fewer frames first, then fewer pixels.

A pure function of header facts and a budget of tokens, as the policies of `degrade`.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from eagle_train.data.degrade import Candidate, asked, fewest, frame_order
from eagle_train.data.frames import FrameCount
from eagle_train.types import MediaPlan


@dataclass(frozen=True, kw_only=True)
class FramesThenPixels:
    """Text first; then a limit on the pixels of every picture, as high as the fewest frames allow; then frames.

    More budget never gives a picture fewer tiles or a video fewer frames: what a sample asks for is given up in one
    order, whatever the budget. First videos and documents lose frames and pages, all the same part of what they ask
    for, down to the fewest; the frames that stay keep the size that the video asked for with all of them. Then all
    images, frames and pages together go down the `tile_caps`.

    Args:
        frames: asked of a video; `min_frames` is the least that it must get.
        min_pages: the least that a document must get; it asks for all.
        tile_caps: limits on the tiles, which are tokens, of every image, frame and page.

    Raises:
        ValueError: for numbers below 1.
    """

    frames: FrameCount
    min_pages: int = 1
    tile_caps: Sequence[int] = (16384, 8192, 4096, 2048, 1280, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 32, 16)
    by_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tile_caps or min(*self.tile_caps, self.min_pages) < 1:
            raise ValueError(f"tile_caps {list(self.tile_caps)} and min_pages {self.min_pages} must be at least 1")

    def plan(self, media: Sequence[Candidate], budget: int | None) -> list[MediaPlan]:
        """Returns the plan of each medium; the smallest of all if nothing fits."""
        room = sys.maxsize if budget is None else budget
        full = [each.tiles() if each.tiles else each.frames(asked(each.medium, self.frames)) for each in media]
        plans = self.with_frames(media, full, room)
        return plans if tokens_of(media, plans) <= room else self.with_pixels(media, plans, room)

    def with_frames(self, media: Sequence[Candidate], full: Sequence[MediaPlan], room: int) -> list[MediaPlan]:
        """Returns the plans with as many frames and pages as fit, with the fewest if not even these do.

        Args:
            full: the plan of each medium with all that it asks for.
        """
        moving = [place for place, each in enumerate(media) if not each.tiles]
        most = [full[place].num_steps for place in moving]
        least = [min(steps, self.least_steps(media[n], full[n])) for n, steps in zip(moving, most, strict=True)]
        order = frame_order(least, most)

        def with_added(added: int) -> list[MediaPlan]:
            more = np.bincount(order[:added], minlength=len(moving)).tolist()
            plans = list(full)
            for place, few, added_steps in zip(moving, least, more, strict=True):
                frames = min((few + added_steps) * full[place].frames_per_tile, full[place].num_frames)
                plans[place] = replace(full[place], num_frames=frames)
            return plans

        # Every step adds its tiles, and no label changes, so the tokens grow with what is added.
        fit = bisect_right(range(len(order) + 1), room, key=lambda added: tokens_of(media, with_added(added)))
        return with_added(max(0, fit - 1))

    def least_steps(self, each: Candidate, full: MediaPlan) -> int:
        """Returns the fewest steps in time of a video, or pages of a document."""
        least = self.min_pages if each.medium.kind == "document" else fewest(each.medium, self.frames)
        return -(-least // full.frames_per_tile)

    def with_pixels(self, media: Sequence[Candidate], plans: Sequence[MediaPlan], room: int) -> list[MediaPlan]:
        """Returns the plans, which have the fewest frames, under the highest limit on tiles that fits, or the least."""
        options = [capped(each, plan, self.tile_caps) for each, plan in zip(media, plans, strict=True)]
        levels = list(zip(*options, strict=True))
        fits = [sum(tokens for _, tokens in level) <= room for level in levels]  # true up to some limit, then false
        return [plan for plan, _ in levels[max(0, sum(fits) - 1)]] if levels else []


def capped(each: Candidate, plan: MediaPlan, caps: Sequence[int]) -> list[tuple[MediaPlan, int]]:
    """Returns a medium's plan and tokens under each limit on tiles, from the lowest on; tokens never decrease.

    Args:
        plan: its own, which none of them is to be larger than.
    """
    most, found = each.tokens(plan), []
    for cap in sorted(set(caps)):
        smaller = each.tiles(max_tiles=cap) if each.tiles else each.frames(plan.num_frames, max_tiles=cap)
        tokens = each.tokens(smaller)
        if tokens >= most:
            smaller, tokens = plan, most
        found.append((smaller, tokens) if not found or tokens >= found[-1][1] else found[-1])
    return found


def tokens_of(media: Sequence[Candidate], plans: Sequence[MediaPlan]) -> int:
    """Returns the tokens of media under their plans."""
    return sum(each.tokens(plan) for each, plan in zip(media, plans, strict=True))
