"""Lint of media files: those that are missing or unreadable, clips of nothing, odd sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from eagle_train.data.frames import shown_seconds
from eagle_train.data.images import ImageReader, probe_image
from eagle_train.data.lint import Finding, short
from eagle_train.data.locations import shown
from eagle_train.data.media import MediaError
from eagle_train.data.media_fields import SIZE_FIELDS
from eagle_train.data.media_files import read_media_file
from eagle_train.data.media_sources import WEB
from eagle_train.data.probe import cut_clip
from eagle_train.data.schemas import Record
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.data.videos import probe_video
from eagle_train.types import Media, SampleError

LEAST_SIDE, MOST_ASPECT = 8, 64


def check_files(
    record: Record, media_root: Path | None, images: ImageReader | None, key: str
) -> tuple[list[Finding], list[tuple]]:
    """Returns the findings on the media files of a record, and what tells each from others.

    That is bytes, width, height and bounds of a clip, or the path where there is no picture.

    Args:
        media_root: folder of the files.
        images: how images are decoded, to see if that works; None: only headers are read.
        key: of the record.
    """
    findings, told, sizes = [], [], []
    contents: dict[str, bytes] = {}
    files: list[tuple[str, Media | None]] = []
    for ref, file in [(medium, file) for medium in record.media for file in medium.files]:
        try:
            contents[file.ref] = data = read_media_file(file, media_root, key)
            clip = None
            if file.kind == "video":
                whole = Media(kind="video", member=file.ref, **probe_video(data)._asdict())
                clip = cut_clip(whole, ref.start, ref.end, key)
            width, height = (clip.width, clip.height) if clip else probe_image(data)[:2]
            told.append((len(data), width, height, ref.start, ref.end))
            files.append((file.ref, clip))
            if ref.kind == "image":
                sizes.append((width, height))
        except (SampleError, MediaError) as error:
            told.append((file.ref,))
            named = error.detail if error.detail.startswith(file.ref) else f"{file.ref}: {error.detail}"
            findings.append(Finding(error.reason, short(named)))
    if images is not None and not findings:
        findings += decode_all(files, images, contents.__getitem__)
    return [*findings, *check_sizes(sizes)], told


def check_wishes(record: Record) -> Iterator[Finding]:
    """Yields what a record asks of its media that not every model gives, and media that are far away."""
    sizes = [(ref.kind, *limit) for ref in record.media for limit in ref.limits if limit[0] in SIZE_FIELDS]
    if sizes:
        kind, name, number = sizes[0]
        yield Finding("pixel_limits", f"{kind} with {name} {number}")
    if far := next((path for ref in record.media for path in ref.paths if path.startswith(WEB)), None):
        yield Finding("web_media", short(shown(far)))


def check_sizes(sizes: Iterable[tuple[int, int]]) -> Iterator[Finding]:
    """Yields a finding for the first odd one of image sizes (width, height)."""
    for width, height in sizes:
        if min(width, height) < LEAST_SIDE or max(width, height) > MOST_ASPECT * min(width, height):
            yield Finding("odd_size", f"{width} x {height} pixels")
            return


def media_files(media: Sequence[Media]) -> Iterator[tuple[str, Media | None]]:
    """Yields the name of each file, and of a video file the clip that is taken of it."""
    for medium in media:
        is_file = medium.kind == "video" and not medium.members
        for name in medium.members or [medium.member]:
            yield name, medium if is_file else None


def decode_all(
    files: Iterable[tuple[str, Media | None]], images: ImageReader, read: Callable[[str], bytes]
) -> Iterator[Finding]:
    """Yields a finding for each file that cannot be decoded; of a clip, its first and its last frame are.

    Args:
        files: see `media_files`.
        read: gives the bytes of a file.
    """
    for name, clip in files:
        try:
            if clip is None:
                images.decode(read(name))
            else:
                list(PyAvVideo().decode(read(name), shown_seconds(clip, 2)))
        except MediaError as error:
            yield Finding(error.reason, short(f"{name}: {error}"))
