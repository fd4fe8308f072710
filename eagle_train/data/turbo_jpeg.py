"""JPEG pixels by libjpeg-turbo's own interface; the only module that imports simplejpeg."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from eagle_train.data.images import PillowJpeg


@dataclass(frozen=True)
class TurboJpeg:
    """Decodes colour and grey JPEG files with simplejpeg, and leaves all others to Pillow.

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
                return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
        except ValueError:  # damaged, or subsampled in a way that it does not know
            pass
        return PillowJpeg().decode(data)
