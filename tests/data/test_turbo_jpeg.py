"""TurboJpeg: Pillow's pixels, Pillow's verdict on damage."""

import builtins
import pickle

import numpy as np
import pytest
from PIL import Image

from eagle_train.data.images import ImageReader, PillowJpeg
from eagle_train.data.media import MediaError
from eagle_train.data.turbo_jpeg import TurboJpeg
from eagle_train.train.config import build, load_config
from tests.pictures import SIZE, corners, quarters, saved, segment

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)).resize((150, 121))
PILLOW = ImageReader(jpeg=PillowJpeg())


@pytest.fixture(scope="module")
def simplejpeg():
    return pytest.importorskip("simplejpeg")


@pytest.fixture(scope="module")
def turbo(simplejpeg):
    return ImageReader(jpeg=TurboJpeg())


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}], ids=str)
def test_pixels_are_those_of_pillow(turbo, mode, options):
    data = saved(PHOTO.convert(mode), "jpeg", quality=90, **options)
    ours, pillows = (np.asarray(reader.decode(data), int) for reader in (turbo, PILLOW))
    assert ours.std() > 10 and np.abs(ours - pillows).max() <= 2


def test_colours_that_are_no_ycbcr_are_left_to_pillow(turbo, simplejpeg):
    data = saved(PHOTO, "jpeg", keep_rgb=True)
    assert simplejpeg.decode_jpeg_header(data)[2] == "RGB"
    np.testing.assert_array_equal(turbo.decode(data), PILLOW.decode(data))


def test_images_are_turned_upright(turbo):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(quarters().transpose(Image.Transpose.ROTATE_90), "jpeg", exif=exif, quality=95)
    assert turbo.decode(data).size == SIZE
    np.testing.assert_allclose(corners(turbo.decode(data)), corners(quarters()), atol=25)


def test_the_files_that_pillow_refuses_are_refused_and_no_others(turbo):
    """Cut short anywhere, or with changed bytes in the scan."""
    data = saved(PHOTO, "jpeg", quality=80)
    start = data.index(b"\xff\xda")
    rng = np.random.default_rng(0)
    damaged = [data[:end] for end in range(start, len(data), 7)] + [data[:-2], data[:-1]]
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.integers(start, len(data))] = rng.integers(256)
        damaged.append(bytes(changed))
    verdicts = []
    for bytes_ in damaged:
        verdicts.append([is_readable(reader, bytes_) for reader in (turbo, PILLOW)])
    assert all(ours == pillows for ours, pillows in verdicts)
    assert {ours for ours, _ in verdicts} == {True, False}
    assert not any(ours for ours, _ in verdicts[: len(range(start, len(data), 7)) - 1])


def is_readable(reader, data):
    try:
        reader.decode(data)
    except MediaError:
        return False
    return True


def test_the_library_and_its_version_are_part_of_the_identity(turbo, simplejpeg):
    assert f"jpeg=TurboJpeg(version='{simplejpeg.__version__}')" in repr(turbo)
    assert repr(pickle.loads(pickle.dumps(turbo))) == repr(turbo) != repr(PILLOW)
    target = "data.images.jpeg._target_=eagle_train.data.turbo_jpeg.TurboJpeg"
    assert build(load_config(["+experiment=toy", target])["data"]).images == turbo


def test_without_the_library_the_remedy_is_named(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "simplejpeg":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'eagle-train\[fast-jpeg\]'"):
        TurboJpeg()


def test_a_decoder_is_not_asked_about_files_with_doubtful_headers(turbo):
    data = saved(PHOTO, "jpeg")
    doubtful = data[:2] + segment(0xE2, b"MPF\0") + data[2:]
    np.testing.assert_array_equal(turbo.decode(doubtful), PILLOW.decode(doubtful))
