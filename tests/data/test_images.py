"""Images: sizes from headers, RGB pixels under a policy, one error for hostile bytes."""

import copy
import io
import struct
import zlib
from dataclasses import dataclass, fields

import numpy as np
import pytest
from PIL import Image, ImageOps

from eagle_train.data.images import ORIENTATIONS, ImageReader, probe_image
from eagle_train.data.media import MAX_PIXELS, MediaError
from eagle_train.train.config import build
from eagle_train.types import Media
from tests.configs import composed
from tests.pictures import BLUE, GREEN, GREY, RED, SIZE, WHITE, corners, quarters, saved, with_chunk

READER = ImageReader()
UNDO = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def assert_like(image, expected, tolerance=0):
    assert image.mode == "RGB" and image.size == expected.size
    np.testing.assert_allclose(np.asarray(image, int), np.asarray(expected, int), atol=tolerance)


def planned(data, reader=READER):
    """The size that is planned from the header."""
    width, height, orientation = probe_image(data)
    return reader.size(Media(kind="image", member="", width=width, height=height, orientation=orientation))


def stored_turned(orientation, suffix):
    """`quarters()` stored so that only `orientation` brings it upright."""
    method = UNDO.get(orientation, ORIENTATIONS.get(orientation))
    image = quarters() if method is None else quarters().transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, suffix, exif=exif, **({"quality": 95} if suffix in ("jpeg", "webp") else {}))


def claiming(width, height):
    """A PNG of a few bytes whose header claims another size."""
    png = saved(Image.new("L", (4, 4)))
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.parametrize("suffix", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation, suffix):
    data = stored_turned(orientation, suffix)
    assert planned(data) == SIZE
    lossy = suffix in ("jpeg", "webp")
    if lossy:
        np.testing.assert_allclose(corners(READER.decode(data)), corners(quarters()), atol=25)
    else:
        assert_like(READER.decode(data), quarters())
    assert suffix == "tiff" or (Image.open(io.BytesIO(data)).size == SIZE) == (orientation < 5)


def test_png_orientation_behind_the_pixels_is_found():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = saved(quarters().transpose(UNDO[6]))
    data = with_chunk(plain, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"), before=b"IEND")
    assert planned(plain) == SIZE[::-1] and planned(data) == SIZE
    assert probe_image(data) == (*SIZE[::-1], 6)
    assert_like(READER.decode(data), quarters())


def test_damaged_exif_is_ignored():
    data = saved(quarters(), "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01nonsense", quality=95)
    assert planned(data) == READER.decode(data).size == SIZE


def test_probing_decodes_no_pixel():
    png = bytearray(saved(quarters()))
    start = png.index(b"IDAT") + 4
    png[start : start + 8] = b"\xff" * 8
    assert probe_image(bytes(png)) == (*SIZE, 1)
    with pytest.raises(MediaError):
        READER.decode(bytes(png))


@pytest.mark.parametrize(
    ("image", "suffix", "colour"),
    [
        (Image.new("1", SIZE, 1), "png", WHITE),
        (Image.new("L", SIZE, 128), "png", GREY),
        (Image.new("LA", SIZE, (0, 255)), "png", (0, 0, 0)),
        (Image.new("LA", SIZE, (0, 0)), "png", WHITE),
        (Image.new("RGBA", SIZE, (*RED, 255)), "png", RED),
        (Image.new("RGBA", SIZE, (*RED, 0)), "webp", WHITE),
        (Image.new("RGBA", SIZE, (0, 0, 255, 128)), "png", (127, 127, 255)),
        (Image.new("RGB", SIZE, GREEN).convert("P"), "png", GREEN),
        (Image.new("CMYK", SIZE, (0, 255, 255, 0)), "jpeg", RED),
        (Image.fromarray(np.full(SIZE[::-1], 0x80FF, np.uint16)), "png", GREY),
        (Image.fromarray(np.full(SIZE[::-1], 0xFFFF, np.uint16)), "tiff", WHITE),
        (Image.fromarray(np.full(SIZE[::-1], 0x80FF, np.int32)), "tiff", GREY),
        (Image.new("YCbCr", SIZE, (128, 128, 128)), "jpeg", GREY),
        (Image.new("RGB", SIZE, BLUE), "bmp", BLUE),
        (Image.new("RGB", SIZE, BLUE), "gif", BLUE),
        (Image.new("RGB", SIZE, BLUE), "avif", BLUE),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_any_mode_becomes_rgb_and_transparency_white(image, suffix, colour):
    data = saved(image, suffix)
    assert planned(data) == SIZE
    assert_like(READER.decode(data), Image.new("RGB", SIZE, colour), tolerance=5 if suffix in ("jpeg", "avif") else 1)


@pytest.mark.parametrize(
    ("image", "transparency"),
    [
        (Image.new("P", SIZE, 0), 0),
        (Image.new("P", SIZE, 0), b"\x00\xff"),
        (Image.new("L", SIZE, 7), 7),
        (Image.new("RGB", SIZE, RED), RED),
    ],
)
def test_transparent_colour_becomes_white(image, transparency):
    data = saved(image, "png", transparency=transparency)
    assert_like(READER.decode(data), Image.new("RGB", SIZE, WHITE))


def test_first_picture_of_an_animation_is_taken():
    others = [Image.new("RGB", SIZE, colour) for colour in (GREEN, BLUE)]
    for suffix in ("gif", "png", "webp", "tiff"):
        options = {"lossless": True} if suffix == "webp" else {}
        data = saved(Image.new("RGB", SIZE, RED), suffix, save_all=True, append_images=others, **options)
        with Image.open(io.BytesIO(data)) as animation:
            assert animation.n_frames == 3
        assert_like(READER.decode(data), Image.new("RGB", SIZE, RED))


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "avif"])
def test_cut_images_are_errors(suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    data = saved(noise, suffix)
    assert READER.decode(data).size == (48, 48)
    for share in (0.0, 0.1, 0.5, 0.9):
        with pytest.raises(MediaError) as error:
            READER.decode(data[: int(len(data) * share)])
        assert error.value.reason == "unreadable_image"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", claiming(0, 5), saved(quarters())[:-12]])
def test_what_is_no_whole_image_is_an_error_when_probed(data):
    with pytest.raises(MediaError) as error:
        probe_image(data)
    assert error.value.reason == "unreadable_image" and "0x" not in str(error.value)


def test_decompression_bombs_are_refused_before_decoding():
    for read in (probe_image, READER.decode):
        with pytest.raises(MediaError, match="60000"):
            read(claiming(60_000, 60_000))
    strict, just = ImageReader(max_pixels=64 * 32 - 1), ImageReader(max_pixels=64 * 32)
    for suffix in ("png", "jpeg", "gif"):
        data = saved(quarters(), suffix)
        for read in (strict.decode, lambda data: planned(data, strict)):
            with pytest.raises(MediaError, match="64 x 32 pixels"):
                read(data)
        assert just.decode(data).size == planned(data, just) == SIZE


def test_large_images_give_no_warning():
    assert Image.MAX_IMAGE_PIXELS < 10_000 * 10_000 < MAX_PIXELS
    assert probe_image(claiming(10_000, 10_000)) == (10_000, 10_000, 1)


def test_float_pixels_are_refused():
    with pytest.raises(MediaError, match="no agreed white"):
        READER.decode(saved(Image.new("F", SIZE, 0.5), "tiff"))


def test_formats_that_start_other_programs_are_refused():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "EPS"
    with pytest.raises(MediaError):
        probe_image(data)


def test_media_error_keeps_its_reason_when_copied():
    with pytest.raises(MediaError) as error:
        probe_image(b"")
    twin = copy.copy(error.value)
    assert (twin.reason, str(twin)) == ("unreadable_image", str(error.value))


def test_images_are_left_as_stored_where_the_policy_says_so():
    stored = ImageReader(exif_orientation=False)
    for suffix in ("png", "jpeg", "webp"):
        data = stored_turned(6, suffix)
        assert planned(data, stored) == stored.decode(data).size == SIZE[::-1]
        expected = corners(quarters().transpose(UNDO[6]))
        np.testing.assert_allclose(corners(stored.decode(data)), expected, atol=25)
        assert planned(data) == READER.decode(data).size == SIZE


def test_the_background_shows_behind_transparent_pixels():
    data = saved(Image.new("RGBA", SIZE, (0, 0, 0, 0)))
    assert_like(ImageReader(background=[10, 20, 30]).decode(data), Image.new("RGB", SIZE, (10, 20, 30)))


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"max_pixels": MAX_PIXELS + 1}, f"max_pixels is {MAX_PIXELS + 1}"),
        ({"max_pixels": 0}, "max_pixels is 0"),
        ({"background": [0, 0]}, "background is"),
        ({"background": [0, 0, 256]}, "background is"),
    ],
)
def test_a_policy_out_of_range_is_refused(policy, said):
    with pytest.raises(ValueError, match=said):
        ImageReader(**policy)


def test_the_repr_of_a_policy_is_its_identity():
    config = composed("+experiment=toy")["data"]["images"]
    same = build(config)
    assert repr(same) == repr(READER) == repr(ImageReader(background=[255, 255, 255])) and same == READER
    others = [{"exif_orientation": False}, {"max_pixels": 5}, {"background": (0, 0, 0)}, {"jpeg": Shrunk()}]
    assert len({repr(ImageReader(**other)) for other in others} | {repr(READER)}) == 5
    assert {field.name for field in fields(ImageReader)} == {name for other in others for name in other}


@dataclass(frozen=True)
class Shrunk:
    """A JPEG decoder whose pictures are too small."""

    def decode(self, data):
        return Image.new("RGB", (8, 8))


def test_pixels_that_are_not_those_of_the_header_are_an_error():
    with pytest.raises(MediaError, match="64 x 32 pixels, there are 8 x 8"):
        ImageReader(jpeg=Shrunk()).decode(saved(quarters(), "jpeg"))


def test_pillow_agrees_on_what_upright_is():
    for orientation in range(1, 9):
        data = stored_turned(orientation, "png")
        with Image.open(io.BytesIO(data)) as image:
            assert_like(READER.decode(data), ImageOps.exif_transpose(image))
