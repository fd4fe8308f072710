"""Images of every colour mode, the smallest, the longest, and those made to do harm."""

import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from eagle_train.data.images import ImageReader, probe_image, to_rgb
from eagle_train.data.media import MediaError
from tests.pictures import BLUE, GREY, RED, SIZE, WHITE, chunk, saved, with_chunk

READER = ImageReader()
BOMB = zlib.compress(bytes(100_000_000))


def uniform(image):
    """The one colour of an RGB image."""
    assert image.mode == "RGB"
    ((_, colour),) = image.getcolors()
    return colour


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 128, GREY),
        ("LA", (0, 0), WHITE),
        ("LA", (128, 255), GREY),
        ("PA", (3, 0), WHITE),
        ("RGB", RED, RED),
        ("RGBX", (*RED, 0), RED),
        ("RGBA", (0, 0, 255, 128), (127, 127, 255)),
        ("RGBa", (0, 0, 128, 128), (127, 127, 255)),
        ("CMYK", (0, 255, 255, 0), RED),
        ("YCbCr", (76, 85, 255), RED),
        ("HSV", (170, 255, 255), BLUE),
        ("LAB", (136, 208, 195), RED),
        ("I;16", 0x80FF, GREY),
        ("I;16B", 0xFFFF, WHITE),
        ("I", 0x80FF, GREY),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, expected):
    rgb = to_rgb(Image.new(mode, SIZE, colour), WHITE)
    assert rgb.size == SIZE
    np.testing.assert_allclose(uniform(rgb), expected, atol=12 if mode == "LAB" else 1)


@pytest.mark.parametrize(("mode", "level"), [("I", 70_000), ("I", -1), ("F", 0.5)])
def test_pixels_without_an_agreed_white_are_refused(mode, level):
    with pytest.raises(ValueError, match="convert the file"):
        to_rgb(Image.new(mode, SIZE, level), WHITE)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "PA", "LA", "I;16"])
def test_tiff_keeps_its_mode_and_is_read(mode):
    data = saved(Image.new(mode, SIZE), "tiff")
    assert probe_image(data) == (*SIZE, 1)
    assert READER.decode(data).size == SIZE


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("size", [(1, 1), (27, 1), (1, 27), (1350, 50), (50, 1350)])
def test_the_smallest_and_the_longest_images_are_read(size, suffix):
    data = saved(Image.new("RGB", size, (200, 10, 30)), suffix)
    assert probe_image(data) == (*size, 1)
    image = READER.decode(data)
    assert image.size == size
    np.testing.assert_allclose(image.getextrema(), [(level, level) for level in (200, 10, 30)], atol=6)


@pytest.mark.parametrize(
    ("kind", "start"), [(b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")], ids=lambda kind: str(kind)
)
def test_compressed_texts_that_would_fill_the_memory_are_refused(kind, start):
    data = with_chunk(saved(Image.new("RGB", SIZE)), kind, start + BOMB, before=b"IDAT")
    began = time.perf_counter()
    for read in (probe_image, READER.decode):
        with pytest.raises(MediaError, match="too large"):
            read(data)
    assert time.perf_counter() - began < 2


def test_no_more_pixels_are_unpacked_than_the_header_says():
    png = saved(Image.new("RGB", SIZE))
    start = png.index(b"IDAT") - 4
    began = time.perf_counter()
    assert READER.decode(png[:start] + chunk(b"IDAT", BOMB) + chunk(b"IEND", b"")).size == SIZE
    assert time.perf_counter() - began < 2


def gif(canvas, frame):
    """A GIF whose screen and first picture have the given sizes."""
    data = bytearray(saved(Image.new("P", (8, 6), 1), "gif"))
    place = data.index(b",\0\0\0\0\x08\0\x06\0")
    struct.pack_into("<HH", data, 6, *canvas)
    struct.pack_into("<HH", data, place + 5, *frame)
    return bytes(data)


def test_a_gif_picture_larger_than_its_screen_is_planned_as_it_is_decoded():
    data = gif((4, 3), (8, 6))
    assert probe_image(data) == (8, 6, 1)
    assert READER.decode(data).size == (8, 6)


@pytest.mark.parametrize(("canvas", "frame"), [((4, 3), (60_000, 60_000)), ((60_000, 60_000), (8, 6))])
def test_a_gif_of_enormous_screen_or_picture_is_refused(canvas, frame):
    for read in (probe_image, READER.decode):
        with pytest.raises(MediaError, match="3600000000"):
            read(gif(canvas, frame))
