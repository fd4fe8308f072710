"""Which split a picture may belong to: decided by its pixels, so no picture can be in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

from PIL import Image

from eagle_train.data.toy.draw import png_bytes
from eagle_train.data.toy.video import mp4_bytes

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
MAX_DRAWS = 1000
"""A held-out picture takes 4 draws on average; 1000 failures mean that drawing does not vary (0.75^1000)."""


def split_of(pixels: bytes) -> Split:
    """Returns the split that a picture or file with these bytes belongs to: a quarter of all is held out."""
    return "heldout" if hashlib.sha256(pixels).digest()[0] % 4 == 0 else "train"


def image_in_split(split: Split, draw: Callable[[], Image.Image]) -> bytes:
    """Returns as PNG the first picture out of `draw` whose pixels belong to `split`."""
    for _ in range(MAX_DRAWS):
        image = draw()
        if split_of(image.tobytes()) == split:
            return png_bytes(image)
    raise AssertionError(f"none of {MAX_DRAWS} pictures belongs to {split}: drawing does not vary")


def video_in_split(split: Split, draw: Callable[[], list[Image.Image]], *, frames_per_second: int) -> bytes:
    """Returns as mp4 the first clip out of `draw` whose file belongs to `split`.

    The file decides, not the frames: compression could make one file of two almost equal clips.
    """
    for _ in range(MAX_DRAWS):
        data = mp4_bytes(draw(), frames_per_second=frames_per_second)
        if split_of(data) == split:
            return data
    raise AssertionError(f"none of {MAX_DRAWS} clips belongs to {split}: drawing does not vary")
