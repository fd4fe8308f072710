"""Pictures of native resolution: resized as little as possible to whole tiles, within bounds on their pixels.

Shape letters: N tiles, D frames of a tile, S its side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from eagle_train.data.media import MediaError
from eagle_train.types import Grid, Media, MediaPlan

LARGEST_ASPECT = 200
"""Longer over shorter side; Qwen2-VL refuses more."""


@dataclass(frozen=True, kw_only=True)
class SmartResize:
    """Qwen2-VL's naive dynamic resolution: each picture becomes as many tiles as it has room for, each a visual token.

    A tile is a block of D frames of S x S pixels. Two frames of a video share their tiles; an image, or a page of a
    document, fills both frames. Bounds count pixels of the resized picture, of a video those of every frame:

        most of a frame = max(min(video_max_pixels, D * video_total_pixels / frames), 1.05 * video_min_pixels)

    A record may ask for other bounds of a medium, of a video also for another `video_total_pixels`, or for a size
    itself, which is then resized within `min_pixels` and `max_pixels`, of a video too.

    Args:
        tile_size: S: patch times merge.
        tile_depth: D.
        min_pixels, max_pixels: of an image or page.
        video_min_pixels, video_max_pixels: of a frame.
        video_total_pixels: of all frames of a video, as far as the least of a frame allows; each counts 1 / D.
        resample: name of a filter of `PIL.Image.Resampling`.

    Raises:
        ValueError: for bounds that leave nothing.

    Source: Qwen2-VL (arXiv 2409.12191); qwen-vl-utils, `vision_process.py`.
    """

    tile_size: int = 28
    tile_depth: int = 2
    min_pixels: int = 4 * 28**2
    max_pixels: int = 16384 * 28**2
    video_min_pixels: int = 128 * 28**2
    video_max_pixels: int = 768 * 28**2
    video_total_pixels: int = int(128_000 * 28**2 * 0.9)
    resample: str = "bicubic"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("", self.min_pixels, self.max_pixels),
            ("video_", self.video_min_pixels, self.video_max_pixels),
        ):
            if not 1 <= least <= most or most < self.tile_size**2:
                raise ValueError(
                    f"{name}min_pixels {least} and {name}max_pixels {most} leave no picture; the least is at least 1, "
                    f"the most no less than that, nor than a tile, {self.tile_size**2}"
                )
        filters = [member.name.lower() for member in Image.Resampling]
        if self.resample not in filters:
            raise ValueError(f"resample {self.resample!r} is none of Pillow's filters {filters}")

    def of(self, media: Media) -> OfMedium:
        """Returns the tiling with the bounds or the size that the record of a medium asks for."""
        return OfMedium(self, media)

    def plan(self, width: int, height: int, max_tiles: int | None = None) -> MediaPlan:
        """Returns the tiles of an image of this size (pixels) without wishes of its own, see `OfMedium`."""
        return self.of(Media(kind="image")).plan(width, height, max_tiles)

    def plan_frames(
        self, media: Media, size: tuple[int, int], num_frames: int, max_tiles: int | None = None
    ) -> MediaPlan:
        """Returns the tiles of so many frames of a video or pages of a document, see `OfMedium`."""
        return self.of(media).plan_frames(media, size, num_frames, max_tiles)

    def frame_bounds(self, media: Media, num_frames: int) -> tuple[int, int]:
        """Returns the fewest and most pixels of each of so many frames of a video, by its record or by the run."""
        least, total = media.min_pixels or self.video_min_pixels, media.total_pixels or self.video_total_pixels
        most = max(min(self.video_max_pixels, total / num_frames * self.tile_depth), int(least * 1.05))
        return least, int(min(media.max_pixels or most, most))

    def cut(self, image: Image.Image, plan: MediaPlan, out: np.ndarray) -> None:
        """Writes the tiles of an RGB `image` into `out` (N, 3, D, S, S) uint8."""
        self.cut_all([image], plan, out)

    def cut_all(self, pictures: Iterable[Image.Image], plan: MediaPlan, out: np.ndarray) -> None:
        """Writes the tiles of the pictures of a plan into `out` (N, 3, D, S, S) uint8.

        What is missing of the last tiles, or of an image's second frame, is the last picture again.

        Raises:
            ValueError: if `out` has another shape than the plan's tiles.
        """
        rows, cols, side, together = plan.rows, plan.cols, self.tile_size, plan.frames_per_tile
        needed = (plan.num_tiles, 3, self.tile_depth, side, side)
        if out.shape != needed:
            raise ValueError(
                f"{plan} needs an array {needed}, out is {out.shape}; the tiling's tile_size must be data.tile_size"
            )
        steps = out.reshape(plan.num_steps, rows, cols, 3, self.tile_depth, side, side)
        for number, picture in enumerate(pictures):
            step, frame = divmod(number, together)
            resized = picture.resize((cols * side, rows * side), Image.Resampling[self.resample.upper()])
            for colour, band in enumerate("RGB"):
                plane = np.frombuffer(resized.tobytes("raw", band), np.uint8).reshape(rows, side, cols, side)
                steps[step, :, :, colour, frame:] = plane.swapaxes(1, 2)[:, :, None]

    def grids(self, plan: MediaPlan, num_runs: int) -> tuple[Grid, ...]:
        """Returns the grid of each of so many equal runs of visual tokens of a medium."""
        return ((plan.num_steps // num_runs, plan.rows, plan.cols),) * num_runs

    def views(self, tiles: np.ndarray, plan: MediaPlan) -> Iterator[np.ndarray]:
        """Yields the resized pictures (3, height, width) uint8 of tiles (N, 3, D, S, S) of whole steps of a plan."""
        _, _, depth, side, _ = tiles.shape
        steps = tiles.reshape(-1, plan.rows, plan.cols, 3, depth, side, side)
        for step in steps:
            for frame in range(plan.frames_per_tile):
                yield step[:, :, :, frame].transpose(2, 0, 3, 1, 4).reshape(3, plan.rows * side, plan.cols * side)


@dataclass(frozen=True)
class OfMedium:
    """How one medium is resized: a `SmartResize` and what the medium's record asks for.

    Args:
        resize: bounds for all media.
        media: its `min_pixels`, `max_pixels`, `total_pixels`, `resized_width` and `resized_height`, each 0 where it
            asks for none.
    """

    resize: SmartResize
    media: Media

    def plan(self, width: int, height: int, max_tiles: int | None = None) -> MediaPlan:
        """Returns the tiles of an image, or of a page, of this size (pixels).

        Args:
            max_tiles: a limit below all other bounds, the least number of pixels too.

        Raises:
            MediaError: for an image whose one side is more than `LARGEST_ASPECT` times the other.
        """
        least, most = self.media.min_pixels or self.resize.min_pixels, self.media.max_pixels or self.resize.max_pixels
        return self._plan((width, height), (least, most), max_tiles)

    def plan_frames(
        self, media: Media, size: tuple[int, int], num_frames: int, max_tiles: int | None = None
    ) -> MediaPlan:
        """Returns the tiles of so many frames of a video, D of which share theirs, or pages of a document.

        Args:
            size: width and height in pixels of its largest picture.
            max_tiles: how many a frame or page may have.

        Raises:
            MediaError: as `plan`.
        """
        if media.kind == "document":
            return replace(self.plan(*size, max_tiles), num_frames=num_frames)
        one = self._plan(size, self.resize.frame_bounds(self.media, num_frames), max_tiles)
        return replace(one, num_frames=num_frames, frames_per_tile=self.resize.tile_depth)

    def _plan(self, size: tuple[int, int], bounds: tuple[int, int], max_tiles: int | None) -> MediaPlan:
        side = self.resize.tile_size
        least, most = bounds
        if self.media.resized_width and self.media.resized_height:
            size = self.media.resized_width, self.media.resized_height
            least, most = self.resize.min_pixels, self.resize.max_pixels
        if max_tiles is not None:
            most = min(most, max_tiles * side**2)
        cols, rows = smart_resize(*size, tile=side, min_pixels=min(least, most), max_pixels=most)
        if max_tiles is not None and cols * rows > max_tiles:  # scaled up, and its sides rounded up
            cols, rows = smart_resize(*size, tile=side, min_pixels=1, max_pixels=most)
        return MediaPlan(rows=rows, cols=cols)


def smart_resize(width: int, height: int, *, tile: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns the (cols, rows) of tiles to which a picture of this size (pixels) is resized.

    Each side is rounded to whole tiles, halves to the even number, but to at least one. A picture that then has too
    many pixels is scaled down to `max_pixels` and its sides rounded down, one that has too few scaled up and rounded
    up. No side is less than a tile: a strip so thin that scaling would make it less keeps one, and has more pixels
    than asked for by as much.

    Args:
        tile: side of a tile in pixels.

    Raises:
        MediaError: for a picture whose one side is more than `LARGEST_ASPECT` times the other.

    Source: qwen-vl-utils, `smart_resize`. It gives 0 for a strip of 20 x 3900 pixels and at most 50,176; transformers,
    whose function has a side of at least one tile there, gives 0 before that for sides below half a tile.
    """
    if not 0 < max(width, height) <= LARGEST_ASPECT * min(width, height):
        raise MediaError(
            "unreadable_image", f"{width} x {height} pixels; one side may be {LARGEST_ASPECT} times the other at most"
        )
    cols, rows = max(1, round(width / tile)), max(1, round(height / tile))
    if cols * rows * tile**2 > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        cols, rows = (max(1, math.floor(side / shrink / tile)) for side in (width, height))
    elif cols * rows * tile**2 < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        cols, rows = (math.ceil(side * grow / tile) for side in (width, height))
    return cols, rows
