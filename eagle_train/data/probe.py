"""What an image or video in a shard says about itself, from as few of its bytes as tell it."""

from __future__ import annotations

from eagle_train.data.media import MAX_PIXELS, MediaError, probe_image, probe_video
from eagle_train.data.schemas import MediaRef
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.types import Media, SampleError

HEAD_BYTES = 1 << 16
"""Of a JPEG that are read first; the size comes later only behind a long EXIF block or colour profile."""
JPEG_START = b"\xff\xd8\xff"
FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""JPEG markers (ITU-T T.81, table B.1) of the coding processes in use: baseline, extended, progressive."""
SKIPPED = frozenset({0xC4, 0xDB, 0xDD, 0xE0, 0xEE, 0xFE})
"""Segments that change nothing about the size: tables, restart interval, JFIF, Adobe's, comments."""
SCAN = 0xDA


def probe_medium(reader: ShardReader, key: str, ref: MediaRef, member: Member) -> Media:
    """Returns the header facts of one image or video.

    Raises:
        SampleError: if it is unreadable.
    """
    try:
        if ref.kind == "image":
            width, height = probe_image_member(reader, member)
            return Media(kind="image", member=member.name, width=width, height=height)
        width, height, duration, num_frames = probe_video(reader.read(member))
    except MediaError as error:
        raise SampleError(key, error.reason, f"{member.name}: {error}") from error
    return Media(kind="video", member=member.name, width=width, height=height, duration=duration, num_frames=num_frames)


def probe_image_member(reader: ShardReader, member: Member) -> tuple[int, int]:
    """Returns what `probe_image` says of a member; of most JPEGs only the head is read.

    Other formats are read whole: their orientation, and the mark that they are whole, may be at the end.
    """
    if member.size > HEAD_BYTES:
        head = reader.read(Member(member.name, member.offset, HEAD_BYTES))
        if size := jpeg_size(head):
            return size
        if head.startswith(JPEG_START):
            try:
                return probe_image(head)
            except MediaError:  # nothing is known before all of it was seen
                pass
    data = reader.read(member)
    return jpeg_size(data) or probe_image(data)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns (width, height) of a plain JPEG; None for anything that is better left to `probe_image`.

    That is: what has EXIF data or a colour profile, is of a rare kind, damaged, too large, or no JPEG.
    """
    if not data.startswith(JPEG_START):
        return None
    size = None
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == SCAN:
            return size
        if marker in FRAMES and size is None and length in (11, 17, 20) and place + 10 <= len(data):
            height, width = int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
            if data[place + 4] != 8 or length != 8 + 3 * data[place + 9] or not 0 < width * height <= MAX_PIXELS:
                return None
            size = width, height
        elif marker not in SKIPPED:
            return None
        place += 2 + length
    return None
