"""What the toy pictures are drawn with: colours, sizes, shapes, print, and the PNG bytes.

The readers of these pictures are models of a few million parameters that see 96 x 96 pixels, so colours are
few and far apart and everything is large. Coordinates are in pixels; `x, y` grow to the right and downwards.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Mapping
from types import MappingProxyType

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
"""Red, green, blue in 0..255."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

INKS: Mapping[str, Colour] = MappingProxyType(
    {
        "red": (225, 25, 25),
        "green": (20, 165, 45),
        "blue": (35, 70, 235),
        "yellow": (250, 215, 0),
        "cyan": (0, 205, 220),
        "magenta": (215, 20, 190),
    }
)
"""Colours of what is drawn."""
BACKGROUNDS: Mapping[str, Colour] = MappingProxyType(
    {
        "white": (245, 245, 245),
        "black": (12, 12, 12),
        "grey": (128, 128, 128),
        "pink": (250, 190, 205),
        "brown": (92, 54, 24),
    }
)
"""Colours of what it is drawn on; none of them is an ink."""
SHAPES = ("circle", "square", "triangle", "star", "cross")

COLOUR_JITTER = 8
"""A colour channel differs from the table by at most this much."""
SUPERSAMPLING = 2
"""Canvas pixels per picture pixel and axis; averaging them smooths the edges."""
STROKE = 0.04
"""Print is fattened by this share of the font size, on both sides of a line."""
MIN_SIDE, MAX_SIDE = 64, 160
"""Sides of a picture in pixels; the longer one is at most twice the shorter one."""


def jitter(colour: Colour, rng: random.Random) -> Colour:
    """Returns a colour next to `colour`, so that no two pictures need be equal."""
    low, high = zip(*((max(0, c - COLOUR_JITTER), min(255, c + COLOUR_JITTER)) for c in colour), strict=True)
    return rng.randint(low[0], high[0]), rng.randint(low[1], high[1]), rng.randint(low[2], high[2])


def luma(colour: Colour) -> float:
    """Returns the brightness in 0..255 (ITU-R BT.601)."""
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue


def contrast(colour: Colour) -> Colour:
    """Returns black for a light colour and white for a dark one."""
    return (0, 0, 0) if luma(colour) > 110 else (255, 255, 255)


def papers(ink: str) -> list[str]:
    """Returns the `BACKGROUNDS` on which print in this ink is easy to read."""
    return [name for name, colour in BACKGROUNDS.items() if abs(luma(colour) - luma(INKS[ink])) > 65]


def random_size(rng: random.Random, *, wide: bool, max_aspect: float = 2.0) -> tuple[int, int]:
    """Returns a (width, height) in pixels whose longer side is the width if `wide`, else the height."""
    long = rng.randint(96, MAX_SIDE)
    short = rng.randint(max(MIN_SIDE, math.ceil(long / max_aspect)), long)
    return (long, short) if wide else (short, long)


class Canvas:
    """A picture in the making, drawn enlarged and averaged down at the end.

    Args:
        size: (width, height) of the finished picture in pixels.
        background: its colour everywhere.
    """

    def __init__(self, size: tuple[int, int], background: Colour) -> None:
        enlarged = (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
        self._image = Image.new("RGB", enlarged, background)
        self._draw = ImageDraw.Draw(self._image)

    def rectangle(self, box: Box, colour: Colour) -> None:
        """Fills `box`."""
        left, top, right, bottom = (value * SUPERSAMPLING for value in box)
        self._draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)

    def shape(self, name: str, centre: tuple[float, float], radius: float, colour: Colour) -> None:
        """Fills the shape `name` (see `SHAPES`) inside the square of side `2 * radius` around `centre`."""
        x, y, radius = centre[0] * SUPERSAMPLING, centre[1] * SUPERSAMPLING, radius * SUPERSAMPLING
        if name == "circle":
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        else:
            self._draw.polygon([(x + radius * dx, y + radius * dy) for dx, dy in outline(name)], fill=colour)

    def text(self, text: str, box: Box, colour: Colour) -> None:
        """Prints one line, as large as `box` allows, at its left and in the middle of its height."""
        left, top, right, bottom = (value * SUPERSAMPLING for value in box)
        size = font_size(text, right - left, bottom - top)
        font, stroke = ImageFont.load_default(size=size), round(STROKE * size)
        self._draw.text((left, (top + bottom) / 2), text, colour, font, "lm", stroke_width=stroke)

    def image(self) -> Image.Image:
        """Returns the finished RGB picture."""
        return self._image.reduce(SUPERSAMPLING)


def outline(name: str) -> list[tuple[float, float]]:
    """Returns the corners of a polygon of `SHAPES`, within [-1, 1] on both axes.

    Raises:
        ValueError: for a name that is no polygon.
    """
    match name:
        case "square":
            return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
        case "triangle":
            return [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)]
        case "star":
            angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
            radii = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
            return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
        case "cross":
            arm = [(0.33, -0.33), (1.0, -0.33), (1.0, 0.33)]
            quarters = [(1, 0), (0, 1), (-1, 0), (0, -1)]  # cosine and sine of 0, 90, 180 and 270 degrees
            return [(c * x - s * y, s * x + c * y) for c, s in quarters for x, y in arm]
    raise ValueError(f"no outline for shape {name!r}; the polygons are {SHAPES[1:]}")


def font_size(text: str, width: float, height: float) -> int:
    """Returns the largest size of Pillow's own font in which `text` fits into `width` x `height` pixels."""
    trial = 100
    font = ImageFont.load_default(size=trial)
    left, top, right, bottom = font.getbbox(text, anchor="lm", stroke_width=round(STROKE * trial))
    # "lm" centres the line, not what is printed, so twice the larger overhang must fit.
    return max(1, math.floor(trial * min(width / (right - min(left, 0)), height / (2 * max(-top, bottom)))))


def png_bytes(image: Image.Image) -> bytes:
    """Returns the image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
