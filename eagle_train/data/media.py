"""What images and videos share: their error, and the limit on their size.

The bytes come from the web, so whatever a parser raises on them means one thing: a `MediaError`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from eagle_train.data.retries import StorageError

MAX_PIXELS = 178_956_970
"""Largest image or video frame that is opened. Twice `PIL.Image.MAX_IMAGE_PIXELS`, where Pillow 13 itself refuses."""

Reason = Literal["unreadable_image", "unreadable_video"]
OF_FILES = frozenset({"missing_media", "unreadable_image", "unreadable_video"})
"""Reasons that are gone when the file is put there or repaired, though the record stays what it is."""


class MediaError(ValueError):
    """Bytes that are no usable image or video.

    Args:
        reason: the word to count it by.
        detail: what exactly is wrong.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


@contextmanager
def reported_as(reason: Reason) -> Iterator[None]:
    """Turns whatever Pillow or FFmpeg raises on hostile bytes into MediaError, and keeps their warnings quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except StorageError:
        raise  # of a file that is read as it is decoded: an outage is no defect of the sample
    except Exception as error:  # both raise OSError, SyntaxError, struct.error, IndexError, ... by the bytes
        raise MediaError(reason, f"{type(error).__name__}: {error}") from error


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises ValueError for a picture that is empty or would not fit in memory."""
    if width < 1 or height < 1 or width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels; usable are 1 to {max_pixels}")
