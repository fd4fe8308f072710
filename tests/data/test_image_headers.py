"""Size and orientation from first bytes: Pillow's answer or none, however the bytes are changed."""

import random
import struct
import zlib

import pytest

from eagle_train.data import images
from eagle_train.data.image_headers import read_header
from eagle_train.data.images import probe_image
from eagle_train.data.media import MediaError
from tests.pictures import SIZE, chunk, quarters, saved, segment, tiff, with_chunk


def asked_of_pillow(data, monkeypatch):
    """What Pillow says, or that it refuses the file."""
    with monkeypatch.context() as patch:
        patch.setattr(images, "read_header", lambda data: None)
        try:
            return probe_image(data)
        except MediaError:
            return "refused"


def orientation_tag(value, order="<"):
    return tiff((0x0112, 3, 1, value), order=order)


def jpeg_with(*segments, **options):
    data = saved(quarters(), "jpeg", **options)
    return data[:2] + b"".join(segments) + data[2:]


def png_with(*chunks, mode="RGB"):
    data = saved(quarters().convert(mode))
    place = data.index(b"IDAT") - 4
    return data[:place] + b"".join(chunks) + data[place:]


def exif(block):
    return segment(0xE1, b"Exif\0\0" + block)


XMP = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')
ANSWERED = {
    "baseline": (jpeg_with(), 1),
    "progressive": (jpeg_with(progressive=True), 1),
    "comment, profile, Photoshop": (
        jpeg_with(
            segment(0xFE, b"hello"),
            segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(40)),
            segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\0"),
        ),
        1,
    ),
    "little-endian EXIF": (jpeg_with(exif(orientation_tag(6))), 6),
    "big-endian EXIF": (jpeg_with(exif(orientation_tag(3, ">"))), 3),
    "EXIF without orientation": (jpeg_with(exif(tiff((0x0128, 3, 1, 2)))), 1),
    "no such orientation": (jpeg_with(exif(orientation_tag(9))), 1),
    "EXIF before XMP": (jpeg_with(exif(orientation_tag(8)), XMP), 8),
    "plain PNG": (png_with(), 1),
    "palette PNG": (png_with(chunk(b"tRNS", b"\0"), mode="P"), 1),
    "PNG with text and profile": (
        png_with(chunk(b"tEXt", b"Software\0x"), chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(9)))),
        1,
    ),
    "PNG with EXIF": (png_with(chunk(b"eXIf", orientation_tag(5))), 5),
}
LEFT_TO_PILLOW = {
    "XMP orientation": jpeg_with(XMP),
    "two EXIF blocks": jpeg_with(exif(orientation_tag(6)), exif(orientation_tag(3))),
    "orientation of another type": jpeg_with(exif(tiff((0x0112, 4, 1, 6)))),
    "EXIF value outside": jpeg_with(exif(tiff((0x010F, 2, 99, 8), (0x0112, 3, 1, 6)))),
    "several pictures": jpeg_with(segment(0xE2, b"MPF\0" + tiff())),
    "short JFIF": jpeg_with(segment(0xE0, b"JFIF\0")),
    "bad quantization table": jpeg_with(segment(0xDB, bytes(64))),
    "bytes between segments": jpeg_with(b"\0"),
    "EXIF behind the pixels": with_chunk(png_with(), b"eXIf", orientation_tag(6), before=b"IEND"),
    "XMP in a PNG": png_with(chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<tiff:Orientation="6"')),
    "a text for an attribute": png_with(chunk(b"tEXt", b"bbox\0x")),
    "animation": png_with(chunk(b"acTL", struct.pack(">II", 1, 0))),
    "profile bomb": png_with(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1 << 21)))),
    "wrong checksum": png_with().replace(b"IHDR\0\0\0\x40", b"IHDR\0\0\0\x41"),
    "without end": png_with()[:-12],
    "no pixels": png_with()[:33] + chunk(b"IEND", b""),
    "GIF": saved(quarters(), "gif"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", ANSWERED)
def test_plain_files_are_answered_as_pillow_does(name, monkeypatch):
    data, orientation = ANSWERED[name]
    assert read_header(data) == asked_of_pillow(data, monkeypatch) == (*SIZE, orientation)


@pytest.mark.parametrize("name", LEFT_TO_PILLOW)
def test_what_is_unusual_is_left_to_pillow(name):
    assert read_header(LEFT_TO_PILLOW[name]) is None


def test_the_first_bytes_are_enough_for_a_jpeg_and_only_a_whole_png_is():
    jpeg = jpeg_with(exif(orientation_tag(6)))
    assert read_header(jpeg) == (*SIZE, 6)
    start = jpeg.index(b"\xff\xda")
    answers = [read_header(jpeg[:end]) for end in range(len(jpeg))]
    assert answers[:start] == [None] * start and answers[-1] == (*SIZE, 6)
    assert set(answers) == {None, (*SIZE, 6)}
    png = png_with(chunk(b"eXIf", orientation_tag(6)))
    assert {read_header(png[:end]) for end in range(len(png) - 8)} == {None}


def mutated(data, rng):
    """`data` with one to three changes near its beginning."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        place = rng.randrange(min(len(data), rng.choice([40, 200, 1000])))
        match rng.randrange(4):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                data[place] = rng.choice([0, 1, 6, 0x12, 0xC0, 0xD8, 0xDA, 0xE1, 0xED, 0xFF])
            case 2:
                del data[place : place + rng.randrange(1, 20)]
            case 3:
                data[place:place] = rng.randbytes(rng.randrange(1, 8))
    return bytes(data)


def test_changed_bytes_never_give_an_answer_that_is_not_pillows(monkeypatch):
    rng = random.Random(0)
    files = [data for data, _ in ANSWERED.values()] + [data for data in LEFT_TO_PILLOW.values() if len(data) > 200]
    answered = 0
    for _ in range(4000):
        data = mutated(rng.choice(files), rng)
        if (answer := read_header(data)) is not None:
            answered += 1
            assert answer == asked_of_pillow(data, monkeypatch), data
    assert answered > 400


SEGMENTS = [
    exif(orientation_tag(6)),
    XMP,
    exif(tiff((0x0112, 3, 1, 6), (0x011A, 5, 1, 8), (0x0128, 3, 1, 2))),
    exif(tiff((0x011A, 2, 0, 0))),
    exif(tiff((0x0112, 3, 1, 6), first=9)),
    segment(0xE0, b"JFIF\0\1"),
    segment(0xEE, b"Adobe"),
    segment(0xE2, b"ICC_PROFILE\0"),
    segment(0xE2, b"MPF\0"),
    segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
    segment(0xDB, bytes([16]) + bytes(128)),
    segment(0xC0, bytes([8, 0, 3, 0, 4, 1, 1, 17, 0])),
    segment(0xC3, bytes([8, 0, 3, 0, 4, 1, 1, 17, 0])),
    segment(0xDC, b"\0\7"),
]
CHUNKS = [
    chunk(b"eXIf", orientation_tag(6)),
    chunk(b"eXIf", b"MM"),
    chunk(b"tEXt", b"exif\0abc"),
    chunk(b"tEXt", b"transparency\0a"),
    chunk(b"tEXt", b"XML:com.adobe.xmp\0tiff:Orientation>6"),
    chunk(b"tRNS", b"\0"),
    chunk(b"iCCP", b"p\0\0junk"),
    chunk(b"iCCP", b"ppp"),
    chunk(b"gAMA", bytes(2)),
    chunk(b"gAMA", bytes(4)),
    chunk(b"pHYs", bytes(8)),
    chunk(b"IEND", b""),
    chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 3, 8, 2, 0, 0, 0)),
    chunk(b"acTL", struct.pack(">II", 2, 0)),
    chunk(b"abCd", b"x"),
]


@pytest.mark.parametrize(("make", "parts"), [(jpeg_with, SEGMENTS), (png_with, CHUNKS)], ids=["jpeg", "png"])
def test_sound_but_odd_parts_never_give_an_answer_that_is_not_pillows(make, parts, monkeypatch):
    answers = []
    for first in parts:
        for second in [b"", *parts]:
            data = make(first, second)
            answer = read_header(data)
            answers.append(answer)
            assert answer in (None, asked_of_pillow(data, monkeypatch)), (first, second)
    assert len(set(answers)) > 2
