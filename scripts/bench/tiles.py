"""Tiles of images: how many sizes a second get their grid, and how long the cutting takes beside the published way.

    python scripts/bench/tiles.py [--repeats 20]

The published way resizes the whole image, crops tile by tile, appends the thumbnail, and stacks the tiles. Both give
the same pixels, which is checked. Times are of one core, without the time that it gave to other processes.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from machine import circumstances
from PIL import Image, __version__

from eagle_train.data.tile_grids import ClosestAspectRatio, ImageAreaPreservation, TileGrid
from eagle_train.types import MediaPlan

SIDE = 448
SIZES = [(640, 480), (1920, 1080), (2480, 3508)]


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Returns the least CPU seconds of `repeats` runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def resized(image: Image.Image, plan: MediaPlan) -> tuple[Image.Image, Image.Image]:
    """Returns the image stretched to its grid, and its thumbnail."""
    return image.resize((plan.cols * SIDE, plan.rows * SIDE)), image.resize((SIDE, SIDE))


def published(image: Image.Image, plan: MediaPlan) -> np.ndarray:
    """Returns the tiles (N, 3, S, S) uint8 of a plan with a thumbnail, cropped one by one."""
    whole, thumbnail = resized(image, plan)
    corners = [(col * SIDE, row * SIDE) for row in range(plan.rows) for col in range(plan.cols)]
    tiles = [np.asarray(whole.crop((left, top, left + SIDE, top + SIDE))) for left, top in corners]
    return np.ascontiguousarray(np.stack([*tiles, np.asarray(thumbnail)]).transpose(0, 3, 1, 2))


def measure_plans(tiling: TileGrid, repeats: int) -> str:
    """Returns how many sizes a second get their grid."""
    draw = random.Random(0)
    sizes = [(draw.randint(50, 4000), draw.randint(50, 4000)) for _ in range(5000)]
    took = seconds(lambda: [tiling.plan(*size) for size in sizes], repeats)
    return f"{type(tiling).__name__}, {tiling.max_tiles} tiles at most: {len(sizes) / took:,.0f} sizes a second"


def measure_cut(tiling: TileGrid, size: tuple[int, int], repeats: int) -> str:
    """Returns how long the cutting of a picture of noise takes."""
    noise = np.random.default_rng(0).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    image, plan = Image.fromarray(noise), tiling.plan(*size)
    out = np.empty((plan.num_tiles, 3, SIDE, SIDE), np.uint8)
    ways = {
        "ours": partial(tiling.cut, image, plan, out),
        "published": partial(published, image, plan),
        "resizing alone": partial(resized, image, plan),
    }
    took = ", ".join(f"{name} {1000 * seconds(way, repeats):.1f} ms" for name, way in ways.items())
    assert np.array_equal(out, published(image, plan))
    return f"{size[0]}x{size[1]}, {plan.num_tiles} tiles: {took}"


def main() -> None:
    """Prints all measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    for name, value in (circumstances() | {"Pillow": __version__}).items():
        print(f"{name}: {value}")
    for kind in (ImageAreaPreservation, ClosestAspectRatio):
        print(measure_plans(kind(tile_size=SIDE), repeats))
    for size in SIZES:
        print(measure_cut(ImageAreaPreservation(tile_size=SIDE), size, repeats))


if __name__ == "__main__":
    main()
