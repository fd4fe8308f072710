"""From an image of any size to square tiles: which tiles (from the size alone) and their pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from eagle_train.types import Grid, Media, MediaPlan

LARGEST_SIDE = 8192
"""Longest side, pixels, that is padded to a square as it is: 268 MB. A valid file of some kilobytes may hold a strip
of 100,000 x 1 pixels, whose square would be 40 GB; longer images are first averaged over whole blocks of pixels."""

LARGEST_ASPECT = 64
"""Longer over shorter side of the part of an image that is resized to be cropped, for the same reason."""


class Tiling(Protocol):
    """How images and frames become tiles: flat ones (3, S, S), see `FlatTiles`, or blocks of frames (3, D, S, S)."""

    @property
    def tile_depth(self) -> int:
        """D, the frames of a tile; 0 for flat tiles."""

    def of(self, media: Media) -> Tiling:
        """Returns the tiling with the sizes that the record of a medium asks for, if it does."""

    def plan(self, width: int, height: int, max_tiles: int | None = None) -> MediaPlan:
        """Returns the tiles of an image of this size (pixels).

        Args:
            max_tiles: how many it may have; None: as many as the tiling gives at most.
        """

    def plan_frames(
        self, media: Media, size: tuple[int, int], num_frames: int, max_tiles: int | None = None
    ) -> MediaPlan:
        """Returns the tiles of so many frames of a video or pages of a document.

        Args:
            size: width and height in pixels of its largest picture.
            max_tiles: how many a frame or page may have.
        """

    def cut(self, image: Image.Image, plan: MediaPlan, out: np.ndarray) -> None:
        """Writes the tiles of an RGB `image` into `out` (N, 3, S, S) uint8, which may be a part of a row's memory."""

    def cut_all(self, pictures: Iterable[Image.Image], plan: MediaPlan, out: np.ndarray) -> None:
        """Writes the tiles of the frames or pages of a plan into `out`, one picture after the other."""

    def grids(self, plan: MediaPlan, num_runs: int) -> tuple[Grid, ...]:
        """Returns the grid of each of so many equal runs of visual tokens of a medium; none of flat tiles."""

    def views(self, tiles: np.ndarray, plan: MediaPlan) -> Iterator[np.ndarray]:
        """Yields what there is to see in the tiles of a plan or a part of it: pictures (3, height, width) uint8."""


class FlatTiles(ABC):
    """Tiles (3, S, S), each of which an encoder sees by itself; a frame or a page is one tile."""

    tile_depth = 0

    def of(self, media: Media) -> FlatTiles:
        """Returns the tiling as it is: the side of a tile is the model's."""
        del media
        return self

    @abstractmethod
    def plan(self, width: int, height: int, max_tiles: int | None = None) -> MediaPlan:
        """Returns the tiles of an image of this size, see `Tiling`."""

    def plan_frames(
        self, media: Media, size: tuple[int, int], num_frames: int, max_tiles: int | None = None
    ) -> MediaPlan:
        """Returns one tile for each frame or page, whatever the size."""
        del media, size, max_tiles
        return MediaPlan(num_frames=num_frames)

    @abstractmethod
    def cut(self, image: Image.Image, plan: MediaPlan, out: np.ndarray) -> None:
        """Writes the tiles of an image, see `Tiling`."""

    def cut_all(self, pictures: Iterable[Image.Image], plan: MediaPlan, out: np.ndarray) -> None:
        """Writes one tile for each picture into `out` (N, 3, S, S) uint8."""
        del plan
        one = MediaPlan()
        for picture, tile in zip(pictures, out, strict=True):
            self.cut(picture, one, tile[None])

    def grids(self, plan: MediaPlan, num_runs: int) -> tuple[Grid, ...]:
        """Returns nothing: tiles stand alone."""
        del plan, num_runs
        return ()

    def views(self, tiles: np.ndarray, plan: MediaPlan) -> Iterator[np.ndarray]:
        """Yields the tiles (3, S, S) one by one."""
        del plan
        yield from tiles


class PadToSquare(FlatTiles):
    """One tile: the image centred on a square of its longer side, resized (bicubic).

    Args:
        colour: RGB of the padding; Eagle 1 pads with the CLIP mean, (122, 116, 104).

    Source: LLaVA-1.5 and Eagle 1, `image_aspect_ratio: pad`.
    """

    def __init__(self, colour: Sequence[int] = (122, 116, 104)) -> None:
        self.colour = tuple(colour)

    def plan(self, width: int, height: int, max_tiles: int | None = None) -> MediaPlan:
        """Returns one tile, whatever the size."""
        del width, height, max_tiles
        return MediaPlan()

    def cut(self, image: Image.Image, plan: MediaPlan, out: np.ndarray) -> None:
        """Writes the tile into `out` (1, 3, S, S) uint8."""
        del plan
        tile_size = out.shape[-1]
        if (side := max(image.size)) > LARGEST_SIDE:
            image = image.reduce(-(-side // LARGEST_SIDE))
            side = max(image.size)
        columns = side
        if image.width == side:
            # Pillow resizes rows first, each on its own, so those of the padding need not be. The pixels are the same.
            columns = tile_size
            image = image.resize((columns, image.height), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (columns, side), self.colour)
        square.paste(image, ((columns - image.width) // 2, (side - image.height) // 2))
        copy_planes(square.resize((tile_size, tile_size), Image.Resampling.BICUBIC), out[0])


class CentreCrop(FlatTiles):
    """One tile: the shorter side resized to the tile, the centre cropped.

    Source: Eagle 1's stage 1, whose scripts set no `image_aspect_ratio`.
    """

    def plan(self, width: int, height: int, max_tiles: int | None = None) -> MediaPlan:
        """Returns one tile, whatever the size."""
        del width, height, max_tiles
        return MediaPlan()

    def cut(self, image: Image.Image, plan: MediaPlan, out: np.ndarray) -> None:
        """Writes the tile into `out` (1, 3, S, S) uint8."""
        del plan
        tile_size = out.shape[-1]
        shorter = min(image.size)
        if max(image.size) > (longest := LARGEST_ASPECT * shorter):
            image = centre(image, *(min(side, longest) for side in image.size))
        # The longer side is rounded down and the crop begins at a whole pixel, as in CLIP's image processor.
        width, height = (tile_size * side // shorter for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        copy_planes(centre(resized, tile_size, tile_size), out[0])


def centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """Returns the middle of an image, `width` x `height` pixels."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def copy_planes(image: Image.Image, out: np.ndarray) -> None:
    """Copies an RGB image into `out` (3, H, W) uint8."""
    for band, plane in zip("RGB", out, strict=True):
        # Pillow picks one colour out of its pixels in a third of the time that numpy takes to rearrange them.
        plane[:] = np.frombuffer(image.tobytes("raw", band), dtype=np.uint8).reshape(plane.shape)
