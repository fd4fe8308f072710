"""What an image or video in a shard says about itself, from as few of its bytes as tell it."""

from __future__ import annotations

from eagle_train.data.image_headers import Header, read_header
from eagle_train.data.images import probe_image
from eagle_train.data.media import MediaError
from eagle_train.data.schemas import MediaRef
from eagle_train.data.shard_reader import Member, ShardReader
from eagle_train.data.videos import probe_video
from eagle_train.types import Media, SampleError

HEAD_BYTES = 1 << 16


def probe_medium(reader: ShardReader, key: str, ref: MediaRef, member: Member) -> Media:
    """Returns the header facts of one image or video.

    Raises:
        SampleError: if it is unreadable.
    """
    try:
        if ref.kind == "image":
            width, height, orientation = probe_member(reader, member)
            return Media(kind="image", member=member.name, width=width, height=height, orientation=orientation)
        width, height, duration, num_frames = probe_video(reader.read(member))
    except MediaError as error:
        raise SampleError(key, error.reason, f"{member.name}: {error}") from error
    return Media(kind="video", member=member.name, width=width, height=height, duration=duration, num_frames=num_frames)


def probe_member(reader: ShardReader, member: Member) -> Header:
    """Returns what `probe_image` gives for an image member, which is read whole only if its head does not tell.

    Raises:
        MediaError: as `probe_image`.
    """
    if member.size > HEAD_BYTES:
        header = read_header(reader.read_range(member.offset, HEAD_BYTES))
        if header is not None:
            return header
    return probe_image(reader.read(member))
