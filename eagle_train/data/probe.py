"""What an image, video or document in a shard says about itself, from as few of its bytes as tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from eagle_train.data.elsewhere import MediaFile
from eagle_train.data.frames import clip_bounds, clip_frames
from eagle_train.data.image_headers import Header, read_header
from eagle_train.data.images import probe_image
from eagle_train.data.media import MediaError
from eagle_train.data.placeholders import MediaRef
from eagle_train.data.videos import WHOLE_BYTES, probe_video
from eagle_train.types import Media, SampleError

HEADS_BYTES = (1 << 12, 1 << 16)
"""Of an image: what nearly all have their size in, and what is enough for a preview among their EXIF data."""
DEFAULT_FPS = 1.0
"""Frames per second of a video that is given as images, where nothing tells it: what caption sets mostly extract."""


def probe_medium(key: str, ref: MediaRef, files: Sequence[MediaFile]) -> Media:
    """Returns the header facts of one image, video or document.

    Args:
        key: names the sample in errors.
        files: its files in order, one for each of `ref.paths`.

    Raises:
        SampleError: if it is unreadable, or a clip has nothing of its file.
    """
    media = probe_file(key, ref, files)
    return replace(media, **dict(ref.limits)) if ref.limits else media


def probe_file(key: str, ref: MediaRef, files: Sequence[MediaFile]) -> Media:
    """Returns what `probe_medium` does, but for what the record asks for."""
    if ref.refs:
        return probe_list(key, ref, files)
    (file,) = files
    try:
        if ref.kind == "image":
            width, height, orientation = probe_picture(file)
            return Media(kind="image", member=file.name, width=width, height=height, orientation=orientation)
        facts = probe_video(file.read() if file.size <= WHOLE_BYTES else file.open())
    except MediaError as error:
        raise SampleError(key, error.reason, f"{file.name}: {error}") from error
    media = Media(kind="video", member=file.name, **facts._asdict())
    return cut_clip(media, ref.start, ref.end, key)


def probe_list(key: str, ref: MediaRef, files: Sequence[MediaFile]) -> Media:
    """Returns the header facts of frames or pages that are images; see `probe_medium`."""
    headers = []
    for file in files:
        try:
            headers.append(probe_picture(file))
        except MediaError as error:
            raise SampleError(key, error.reason, f"{file.name}: {error}") from error
    return Media(
        kind=ref.kind,
        members=tuple(file.name for file in files),
        **largest(headers),
        duration=len(files) / (ref.fps or DEFAULT_FPS) if ref.kind == "video" else 0.0,
        num_frames=len(files),
    )


def largest(headers: Sequence[Header]) -> dict[str, int]:
    """Returns width, height and orientation of the picture with the most pixels, the first of several."""
    return dict(zip(("width", "height", "orientation"), max(headers, key=lambda h: h[0] * h[1]), strict=True))


def cut_clip(media: Media, start: float, end: float, key: str) -> Media:
    """Returns the facts of a clip of a video file, from those of the file; `start` and `end` of 0 are all of it.

    Raises:
        SampleError: `empty_clip`.
    """
    if not start and not end:
        return media
    try:
        start, end = clip_bounds(start, end, media.duration)
    except ValueError as error:
        raise SampleError(key, "empty_clip", f"{media.member}: {error}; correct the annotation") from error
    frames = clip_frames(start, end, media.duration, media.num_frames)
    return replace(media, start=start, end=end, duration=end - start, num_frames=frames)


def probe_picture(file: MediaFile) -> Header:
    """Returns what `probe_image` gives for an image file, which is read whole only if no head of it tells.

    Raises:
        MediaError: as `probe_image`.
    """
    for size in HEADS_BYTES:
        if file.size > size and (header := read_header(file.head(size))) is not None:
            return header
    return probe_image(file.read())
