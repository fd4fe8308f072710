"""Images from their encoded bytes: size and orientation from headers, pixels under an explicit policy."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from eagle_train.data.image_headers import JPEG_START, Header, png_chunks, read_header
from eagle_train.data.media import MAX_PIXELS, MediaError, check_size, reported_as
from eagle_train.types import Media

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "ICO")
"""Pillow's raster formats. Left out are those that start other programs (EPS runs Ghostscript) or are no pictures."""

# EXIF tag 0x0112 (CIPA DC-008, 4.6.4): what brings the stored rows upright.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def probe_image(data: bytes) -> Header:
    """Returns the (width, height, orientation) of an image file: pixels as stored, EXIF orientation 1 to 8.

    No pixel is decoded, but for a PNG with its orientation behind the pixels. Only the first bytes are at hand?
    `image_headers.read_header` gives the same, or None where they do not tell.

    Raises:
        MediaError: if it is no image, is seen to be cut short, has no pixels or more than `MAX_PIXELS`.
    """
    if (header := read_header(data)) is not None:
        return header
    with reported_as("unreadable_image"), _open_image(data, MAX_PIXELS) as image:
        return *image.size, _orientation(image, data)


class JpegDecoder(Protocol):
    """What makes pixels of JPEG files; its repr is part of a run's identity."""

    def decode(self, data: bytes) -> Image.Image:
        """Returns an RGB image as stored, not turned; raises any exception for a file that is damaged."""


@dataclass(frozen=True)
class PillowJpeg:
    """Pillow's own decoder: libjpeg-turbo with the exact inverse transform."""

    def decode(self, data: bytes) -> Image.Image:
        """Returns an RGB image as stored, not turned."""
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")  # from RGB, convert would copy it


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """How images are decoded: whatever decides their size and pixels. Its repr is part of a run's identity.

    Of an animation the first picture is taken. 16-bit grey keeps its upper byte. Colour profiles are not applied.

    Args:
        exif_orientation: turn images upright by their EXIF orientation, or leave them as stored. TIFF files are
            always upright: Pillow turns them itself.
        max_pixels: images with more are bad samples (decompression bombs); at most `MAX_PIXELS`.
        background: RGB, 0 to 255, that shows where an image is transparent.
        jpeg: what makes pixels of JPEG files.

    Raises:
        ValueError: if a limit or a colour is out of its range.
    """

    exif_orientation: bool = True
    max_pixels: int = MAX_PIXELS
    background: Sequence[int] = (255, 255, 255)
    jpeg: JpegDecoder = field(default_factory=PillowJpeg)

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise ValueError(f"images.max_pixels is {self.max_pixels}; Pillow opens 1 to {MAX_PIXELS}")
        if len(self.background) != 3 or not all(0 <= level <= 255 for level in self.background):
            raise ValueError(f"images.background is {self.background}; it is red, green and blue, each 0 to 255")
        object.__setattr__(self, "background", tuple(self.background))  # a config gives a list; one repr for both

    def size(self, media: Media) -> tuple[int, int]:
        """Returns the (width, height) in pixels that `decode` gives for an image with these header facts.

        Raises:
            MediaError: if that is more than `max_pixels`.
        """
        if media.width * media.height > self.max_pixels:
            detail = (
                f"{media.width} x {media.height} pixels are more than {self.max_pixels}; see data.images.max_pixels"
            )
            raise MediaError("unreadable_image", detail)
        turned = self.exif_orientation and media.orientation >= 5
        return (media.height, media.width) if turned else (media.width, media.height)

    def decode(self, data: bytes) -> Image.Image:
        """Returns the image as RGB.

        Raises:
            MediaError: if the bytes are no image, are cut short, hold too many pixels, or pixels without an agreed
                white (32-bit).
        """
        with reported_as("unreadable_image"):
            if data.startswith(JPEG_START) and (header := read_header(data)) is not None:
                *size, orientation = header
                check_size(*size, self.max_pixels)
                rgb = self.jpeg.decode(data)
            else:
                with _open_image(data, self.max_pixels) as image:
                    size, orientation = image.size, _orientation(image, data)
                    rgb = to_rgb(image, self.background)
            if rgb.size != tuple(size):  # an icon, for example, whose directory and picture disagree
                raise ValueError(f"the header says {size[0]} x {size[1]} pixels, there are {rgb.width} x {rgb.height}")
            turned = self.exif_orientation and orientation in ORIENTATIONS
            return rgb.transpose(ORIENTATIONS[orientation]) if turned else rgb


def to_rgb(image: Image.Image, background: Sequence[int]) -> Image.Image:
    """Returns the pixels as RGB, as stored (not turned), with `background` where they are transparent.

    Raises:
        ValueError: for 32-bit pixels beyond 16 bits.
    """
    image.load()
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no agreed white; convert the file to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError(f"32-bit grey levels {levels.min()} to {levels.max()}; convert the file to 16 bits")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Returns the image with its header read."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:  # its text holds a memory address, so no two reports would be equal
        raise ValueError(f"{len(data)} bytes that start with {data[:12]!r} are no picture Pillow knows") from error
    check_size(*image.size, max_pixels)
    if image.format == "PNG" and data.rfind(b"IEND") < 0:  # Pillow fills the missing pixels of small ones
        raise ValueError(f"the PNG is cut short: {len(data)} bytes without the IEND chunk")
    return image


def _orientation(image: Image.Image, data: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 where there is none, or the EXIF block is damaged."""
    if image.format == "TIFF":  # Pillow turns TIFF itself, its size included
        return 1
    try:
        # PNG's own getexif decodes all pixels in search of an eXIf chunk behind them.
        has_none = image.format == "PNG" and all(kind != b"eXIf" for kind, _, _ in png_chunks(data))
        exif = Image.Image.getexif(image) if has_none else image.getexif()
        orientation = exif.get(0x0112, 1)
    except Exception:  # a damaged EXIF block raises nearly anything; viewers show such pictures as stored
        return 1
    return orientation if orientation in ORIENTATIONS else 1
