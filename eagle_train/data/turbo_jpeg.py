"""JPEG pixels by libjpeg-turbo's own interface; the only module that imports simplejpeg."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from eagle_train.data.images import PillowJpeg


@dataclass(frozen=True)
class TurboJpeg:
    """Decodes colour and grey JPEG files with simplejpeg, and leaves all others to Pillow.

    Pillow's wheels bring libjpeg-turbo too: beside Pillow 13 this gave the same pixels in the same time. It is for
    installations whose Pillow was built with another libjpeg.

    What libjpeg-turbo finds damaged, Pillow judges too: it refuses the same files with either decoder. The version of
    simplejpeg, which brings its own libjpeg-turbo, is in the repr: another may give other pixels.

    Raises:
        ValueError: if simplejpeg is not installed.
    """

    version: str = field(init=False)

    def __post_init__(self) -> None:
        try:
            import simplejpeg
        except ImportError as error:
            raise ValueError("TurboJpeg needs simplejpeg: pip install 'eagle-train[fast-jpeg]'") from error
        object.__setattr__(self, "version", simplejpeg.__version__)

    def decode(self, data: bytes) -> Image.Image:
        """Returns an RGB image as stored, not turned."""
        import simplejpeg

        try:
            *_, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("YCbCr", "Gray"):
                pixels = simplejpeg.decode_jpeg(data, "RGB")
                height, width, _ = pixels.shape
                return Image.frombytes("RGB", (width, height), pixels)  # fromarray would copy once more
        except ValueError:  # damaged, or subsampled in a way that it does not know
            pass
        return PillowJpeg().decode(data)
