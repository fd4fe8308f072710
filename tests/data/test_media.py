"""Images and videos: sizes from headers, upright RGB pixels, chosen frames, one error for hostile bytes."""

import copy
import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from eagle_train.data.media import (
    MAX_PIXELS,
    ORIENTATIONS,
    MediaError,
    decode_frames,
    decode_image,
    probe_image,
    probe_video,
)

RED, GREEN, BLUE, GREY, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255)
SIZE = (64, 32)
STEP = 20  # grey levels between one frame of a test video and the next
UNDO = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


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


def assert_like(image, expected, tolerance=0):
    assert image.mode == "RGB" and image.size == expected.size
    np.testing.assert_allclose(np.asarray(image, int), np.asarray(expected, int), atol=tolerance)


def saved(image, suffix="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def stored_turned(orientation, suffix):
    """`quarters()` stored so that only `orientation` brings it upright."""
    method = UNDO.get(orientation, ORIENTATIONS.get(orientation))
    image = quarters() if method is None else quarters().transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, suffix, exif=exif, **({"quality": 95} if suffix in ("jpeg", "webp") else {}))


def with_chunk(png, kind, content, *, before):
    """`png` with one more chunk before the chunk named `before`."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    place = png.index(before) - 4
    return png[:place] + chunk + png[place:]


def claiming(width, height):
    """A PNG of a few bytes whose header claims another size."""
    png = saved(Image.new("L", (4, 4)))
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.parametrize("suffix", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation, suffix):
    data = stored_turned(orientation, suffix)
    assert probe_image(data) == SIZE
    lossy = suffix in ("jpeg", "webp")
    if lossy:
        np.testing.assert_allclose(corners(decode_image(data)), corners(quarters()), atol=25)
    else:
        assert_like(decode_image(data), quarters())
    assert suffix == "tiff" or (Image.open(io.BytesIO(data)).size == SIZE) == (orientation < 5)


def test_png_orientation_behind_the_pixels_is_found():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = saved(quarters().transpose(UNDO[6]))
    data = with_chunk(plain, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"), before=b"IEND")
    assert probe_image(plain) == SIZE[::-1] and probe_image(data) == SIZE
    assert_like(decode_image(data), quarters())


def test_damaged_exif_is_ignored():
    data = saved(quarters(), "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01nonsense", quality=95)
    assert probe_image(data) == decode_image(data).size == SIZE


def test_probing_decodes_no_pixel():
    png = bytearray(saved(quarters()))
    start = png.index(b"IDAT") + 4
    png[start : start + 8] = b"\xff" * 8
    assert probe_image(bytes(png)) == SIZE
    with pytest.raises(MediaError):
        decode_image(bytes(png))


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
    assert probe_image(data) == SIZE
    assert_like(decode_image(data), Image.new("RGB", SIZE, colour), tolerance=5 if suffix in ("jpeg", "avif") else 1)


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
    assert_like(decode_image(data), Image.new("RGB", SIZE, WHITE))


def test_first_picture_of_an_animation_is_taken():
    others = [Image.new("RGB", SIZE, colour) for colour in (GREEN, BLUE)]
    for suffix in ("gif", "png", "webp", "tiff"):
        options = {"lossless": True} if suffix == "webp" else {}
        data = saved(Image.new("RGB", SIZE, RED), suffix, save_all=True, append_images=others, **options)
        with Image.open(io.BytesIO(data)) as animation:
            assert animation.n_frames == 3
        assert_like(decode_image(data), Image.new("RGB", SIZE, RED))


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "avif"])
def test_cut_images_are_errors(suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    data = saved(noise, suffix)
    assert decode_image(data).size == (48, 48)
    for share in (0.0, 0.1, 0.5, 0.9):
        with pytest.raises(MediaError) as error:
            decode_image(data[: int(len(data) * share)])
        assert error.value.reason == "unreadable_image"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", claiming(0, 5), saved(quarters())[:-12]])
def test_what_is_no_whole_image_is_an_error_when_probed(data):
    with pytest.raises(MediaError) as error:
        probe_image(data)
    assert error.value.reason == "unreadable_image" and "0x" not in str(error.value)


def test_decompression_bombs_are_refused_before_decoding():
    for read in (probe_image, decode_image):
        with pytest.raises(MediaError, match="60000"):
            read(claiming(60_000, 60_000))
        with pytest.raises(MediaError, match="64 x 32 pixels"):
            read(saved(quarters()), max_pixels=64 * 32 - 1)
    assert decode_image(saved(quarters()), max_pixels=64 * 32).size == SIZE


def test_large_images_give_no_warning():
    assert Image.MAX_IMAGE_PIXELS < 10_000 * 10_000 < MAX_PIXELS
    assert probe_image(claiming(10_000, 10_000)) == (10_000, 10_000)


def test_float_pixels_are_refused():
    with pytest.raises(MediaError, match="no agreed white"):
        decode_image(saved(Image.new("F", SIZE, 0.5), "tiff"))


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


def video(num_frames, *, suffix="mp4", codec="libx264", size=SIZE, pts=None, options=None, picture=None):
    """A video whose frame i is grey of level i * STEP, or `picture(i)`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=suffix, options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 10)
        for i in range(num_frames):
            image = picture(i) if picture else Image.new("RGB", size, (i * STEP,) * 3)
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = (pts[i] if pts else i), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def numbers(frames):
    return [round(np.asarray(frame).mean() / STEP) for frame in frames]


CONTAINERS = {
    "mp4": {},
    "webm": {"suffix": "webm", "codec": "libvpx"},
    "live webm": {"suffix": "webm", "codec": "libvpx", "options": {"live": "1"}},
    "avi": {"suffix": "avi", "codec": "mpeg4"},
    "variable rate": {"suffix": "matroska", "pts": [0, 1, 2, 9, 10, 11, 12, 40, 41, 60, 61, 62]},
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("wanted", [1, 2, 3, 5, 12, 13, 30])
def test_frames_are_evenly_spaced_from_first_to_last(name, wanted):
    frames = decode_frames(video(12, **CONTAINERS[name]), wanted)
    assert numbers(frames) == np.round(np.linspace(0, 11, wanted)).astype(int).tolist()
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", SIZE)}


@pytest.mark.parametrize("name", CONTAINERS)
def test_header_facts_of_a_video(name):
    width, height, seconds, frames = probe_video(video(12, **CONTAINERS[name]))
    assert (width, height, frames) == (*SIZE, 12)
    assert seconds == pytest.approx(6.3 if "variable" in name else 1.2, abs=0.6 if "variable" in name else 0.05)


def test_webm_tells_neither_count_nor_live_duration():
    with av.open(io.BytesIO(video(12, **CONTAINERS["live webm"]))) as container:
        assert container.streams.video[0].frames == 0 and container.duration is None


def test_a_wrong_frame_count_does_not_move_the_frames():
    data = bytearray(video(12, suffix="avi", codec="mpeg4"))
    length = data.index(b"strh") + 8 + 32  # dwLength of the stream header
    assert struct.unpack_from("<I", data, length) == (12,)
    struct.pack_into("<I", data, length, 30)
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == 30
    assert numbers(decode_frames(bytes(data), 3)) == [0, 6, 11]


# Display matrices (a, b, c, d) of ISO 14496-12: x' = a x + c y, y' = b x + d y, y downwards.
@pytest.mark.parametrize(
    ("matrix", "clockwise"), [((0, 1, -1, 0), 90), ((-1, 0, 0, -1), 180), ((0, -1, 1, 0), 270), ((1, 0, 0, 1), 0)]
)
def test_rotation_metadata_is_applied(matrix, clockwise):
    data = bytearray(video(3, picture=lambda i: quarters()))
    start = data.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">9i", data, start) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a, b, c, d = (value * 65536 for value in matrix)
    struct.pack_into(">9i", data, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    expected = quarters().rotate(-clockwise, expand=True)
    assert probe_video(bytes(data))[:2] == expected.size
    (frame,) = decode_frames(bytes(data), 1)
    assert frame.size == expected.size
    np.testing.assert_allclose(corners(frame), corners(expected), atol=40)


def sound():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", video(12)[:200], sound()], ids=["empty", "page", "cut", "sound"]
)
def test_what_is_no_video_is_an_error(data):
    for read in (probe_video, lambda data: decode_frames(data, 2)):
        with pytest.raises(MediaError) as error:
            read(data)
        assert error.value.reason == "unreadable_video"


def test_damage_towards_the_end_of_a_video_is_an_error():
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 64, 3), np.uint8)
    data = bytearray(video(12, picture=lambda i: Image.fromarray(noise[i])))
    end = data.index(b"moov") - 4
    assert end > 10_000
    data[end - 5000 : end] = b"\xff" * 5000
    assert probe_video(bytes(data))[3] == 12
    with pytest.raises(MediaError):
        decode_frames(bytes(data), 2)


def test_playlists_that_name_other_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.mp4").write_bytes(video(2))
    playlist = b"ffconcat version 1.0\nfile other.mp4\n"
    (tmp_path / "list.txt").write_bytes(playlist)
    with av.open("list.txt") as container:
        assert len(list(container.decode(video=0))) == 2
    with pytest.raises(MediaError):
        probe_video(playlist)


def test_oversized_frames_are_refused():
    for read in (probe_video, lambda data, **limit: decode_frames(data, 2, **limit)):
        with pytest.raises(MediaError, match="64 x 32"):
            read(video(2), max_pixels=64 * 32 - 1)


def test_asking_for_no_frame_is_the_callers_mistake():
    with pytest.raises(ValueError, match="at least 1") as error:
        decode_frames(video(2), 0)
    assert not isinstance(error.value, MediaError)


def test_pillow_agrees_on_what_upright_is():
    for orientation in range(1, 9):
        data = stored_turned(orientation, "png")
        with Image.open(io.BytesIO(data)) as image:
            assert_like(decode_image(data), ImageOps.exif_transpose(image))
