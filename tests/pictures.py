"""Encoded pictures for tests, and their bytes taken apart."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

RED, GREEN, BLUE, GREY, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255)
SIZE = (64, 32)


def quarters(size=SIZE):
    """A picture whose four quarters tell its orientation."""
    image = Image.new("RGB", size)
    width, height = size[0] // 2, size[1] // 2
    for x, y, colour in ((0, 0, RED), (1, 0, GREEN), (0, 1, BLUE), (1, 1, GREY)):
        image.paste(colour, (x * width, y * height, (x + 1) * width, (y + 1) * height))
    return image


def corners(image):
    width, height = image.size
    return [image.getpixel((x, y)) for y in (2, height - 3) for x in (2, width - 3)]


def saved(image, suffix="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def chunk(kind, content):
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(png, kind, content, *, before):
    """`png` with one more chunk before the chunk named `before`."""
    place = png.index(before) - 4
    return png[:place] + chunk(kind, content) + png[place:]


def segment(marker, content):
    """A JPEG segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def tiff(*tags, order="<", first=8):
    """A TIFF block as in EXIF, of (tag, type, count, value) entries."""
    entries = b""
    for tag, kind, count, value in tags:
        fields = (value, 0) if kind == 3 else (value,)
        entries += struct.pack(order + "HHI" + ("HH" if kind == 3 else "I"), tag, kind, count, *fields)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return start + struct.pack(order + "I", first) + struct.pack(order + "H", len(tags)) + entries + bytes(20)
