"""Images cut into a grid of tiles that suits their size: the rules of Eagle 2 (Image Area Preservation) and InternVL.

Every rule is decided in whole numbers, so that its ties are the formula's and not those of rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache

import numpy as np
from PIL import Image

from eagle_train.data.tiling import LARGEST_SIDE, FlatTiles
from eagle_train.types import MediaPlan


class TileGrid(FlatTiles):
    """Cuts an image, stretched to whole tiles, into a grid, and appends the whole image as a thumbnail.

    Tiles are row by row, the thumbnail is last; an image of one tile has none. Nothing is padded: the aspect ratio
    becomes that of the grid.

    Args:
        tile_size: S, side of a tile in pixels.
        max_tiles: the most tiles of a grid; the thumbnail is not counted.
        min_tiles: the fewest, where an image may have as many.
        thumbnail: whether grids of several tiles get one.
        resample: name of a filter of `PIL.Image.Resampling`.

    Raises:
        ValueError: for numbers of tiles that leave no grid, or a filter that Pillow does not have.
    """

    def __init__(
        self,
        *,
        tile_size: int,
        max_tiles: int = 12,
        min_tiles: int = 1,
        thumbnail: bool = True,
        resample: str = "bicubic",
    ) -> None:
        if not 1 <= min_tiles <= max_tiles:
            raise ValueError(f"min_tiles {min_tiles} and max_tiles {max_tiles} leave no grid; 1 <= min <= max")
        filters = [member.name.lower() for member in Image.Resampling]
        if resample not in filters:
            raise ValueError(f"resample {resample!r} is none of Pillow's filters {filters}")
        self.tile_size = tile_size
        self.max_tiles = max_tiles
        self.min_tiles = min_tiles
        self.thumbnail = thumbnail
        self.resample = resample

    @abstractmethod
    def grid(self, width: int, height: int, candidates: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        """Returns the (cols, rows), one of `candidates`, for an image of `width` x `height` pixels."""

    def plan(self, width: int, height: int, max_tiles: int | None = None) -> MediaPlan:
        """Returns the grid and thumbnail of an image of this size (pixels).

        Args:
            max_tiles: a limit below the tiling's own; less than `min_tiles` is obeyed too.

        Raises:
            ValueError: for an image without pixels, or a limit below 1.
        """
        most = self.max_tiles if max_tiles is None else min(max_tiles, self.max_tiles)
        if min(width, height, most) < 1:
            raise ValueError(f"an image of {width} x {height} pixels in at most {most} tiles; each is at least 1")
        cols, rows = self.grid(width, height, grids(min(self.min_tiles, most), most))
        return MediaPlan(rows=rows, cols=cols, thumbnail=self.thumbnail and rows * cols > 1)

    def cut(self, image: Image.Image, plan: MediaPlan, out: np.ndarray) -> None:
        """Writes the tiles of an RGB `image` to `out` (N, 3, S, S) uint8.

        Args:
            plan: of this image, or `MediaPlan()` for a frame or a page: one tile.

        Raises:
            ValueError: if `out` has another shape than the plan's tiles of one image.
        """
        side, rows, cols = self.tile_size, plan.rows, plan.cols
        if out.shape != (needed := (rows * cols + plan.thumbnail, 3, side, side)):
            raise ValueError(
                f"{plan} with tiles of {side} px needs an array {needed}, out is {out.shape}; the tiling's tile_size "
                f"must be that of data.tile_size"
            )
        image = within_limit(image, cols * side)
        self.write(image, out[: rows * cols].reshape(rows, cols, 3, side, side))
        if plan.thumbnail:
            self.write(image, out[-1:, None])

    def write(self, image: Image.Image, out: np.ndarray) -> None:
        """Stretches the image to the grid of `out` (rows, cols, 3, S, S) uint8 and writes its tiles there."""
        rows, cols, _, side, _ = out.shape
        whole = image.resize((cols * side, rows * side), Image.Resampling[self.resample.upper()])
        for colour, band in enumerate("RGB"):
            # Pillow picks one colour out of its pixels in less than half the time that numpy takes to rearrange them.
            plane = np.frombuffer(whole.tobytes("raw", band), dtype=np.uint8)
            out[:, :, colour] = plane.reshape(rows, side, cols, side).swapaxes(1, 2)


class ImageAreaPreservation(TileGrid):
    """Eagle 2 and 2.5: the grid that keeps most of the image's area and of its aspect ratio.

    For an image of W x H pixels, r = W / H, the first largest of

        min(cols rows S^2 / (W H), 0.6) * min((cols / rows) / r, r / (cols / rows))

    in order of tiles, then columns: of equally good grids the smallest.

    Source: Eagle 2.5 (arXiv 2504.15271), eq. 1.
    """

    def grid(self, width: int, height: int, candidates: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        """Returns the (cols, rows) of the largest score."""
        # Times 5 W H, the first factor is whole; the second is a / b with a, b = cols H, rows W in order of size.
        tile, image = 5 * self.tile_size**2, 3 * width * height
        best, best_part, best_whole = (1, 1), 0, 1
        for cols, rows in candidates:
            part, whole = cols * height, rows * width
            if part > whole:
                part, whole = whole, part
            part *= min(cols * rows * tile, image)
            if part * best_whole > best_part * whole:
                best, best_part, best_whole = (cols, rows), part, whole
        return best


class ClosestAspectRatio(TileGrid):
    """InternVL: the grid whose aspect ratio is closest to the image's.

    For an image of W x H pixels, the smallest |cols / rows - W / H|. Of equally close grids, taken in order of
    tiles, then columns, a later one replaces the one before if the image has more than half its pixels,
    W H > 0.5 S^2 cols rows.

    Source: InternVL 1.5 (arXiv 2404.16821), dynamic high resolution, and its released code (facts only).
    """

    def grid(self, width: int, height: int, candidates: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        """Returns the (cols, rows) of the closest ratio."""
        # Times H, the difference is |cols H - rows W| / rows.
        best, best_gap = None, 0
        for cols, rows in candidates:
            gap = abs(cols * height - rows * width)
            closer = best is None or gap * best[1] < best_gap * rows
            if closer or (gap * best[1] == best_gap * rows and 2 * width * height > self.tile_size**2 * cols * rows):
                best, best_gap = (cols, rows), gap
        return best


@lru_cache
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Returns every (cols, rows) of so many tiles, in order of tiles, then columns."""
    found = [(n // rows, rows) for n in range(min_tiles, max_tiles + 1) for rows in range(n, 0, -1) if n % rows == 0]
    return tuple(found)


def within_limit(image: Image.Image, columns: int) -> Image.Image:
    """Returns an image that Pillow resizes to `columns` without more than `LARGEST_SIDE`**2 pixels in between.

    It resizes columns first: 1 x 1,000,000 pixels would become 448 x 1,000,000, 1.8 GB. Rows are averaged over whole
    blocks where that is so, which no image of a usual shape needs.
    """
    block = -(-columns * image.height // LARGEST_SIDE**2)
    return image if block == 1 else image.reduce((1, block))
