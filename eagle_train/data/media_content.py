"""The encoded bytes of a sample's media as their plans need them, and the pictures in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

from PIL import Image

from eagle_train.data.elsewhere import MediaFile, read_all
from eagle_train.data.frames import frame_indices, shown_seconds
from eagle_train.data.images import ImageReader
from eagle_train.data.media import MediaError
from eagle_train.data.video_frames import VideoDecoder
from eagle_train.data.videos import WHOLE_BYTES
from eagle_train.types import Media, MediaPlan

Content = bytes | BinaryIO | Sequence[bytes]
"""Of an image or a video file its bytes, or a file of them; of a list the bytes of each chosen frame or page."""


def read_content(files: Mapping[str, MediaFile], media: Sequence[Media], plans: Sequence[MediaPlan]) -> list[Content]:
    """Returns the content of each medium; large videos are read as they are decoded, and only where that needs it.

    Args:
        files: of the sample, by the names that `media` have for them.

    Raises:
        OSError: if a file cannot be read.
        SampleError: see `SampleFiles`.
    """
    groups = [[files[name] for name in chosen_members(*pair)] for pair in zip(media, plans, strict=True)]
    streamed = [_is_streamed(*pair) for pair in zip(media, groups, strict=True)]
    read = read_all(file for group, is_file in zip(groups, streamed, strict=True) if not is_file for file in group)
    contents: list[Content] = []
    for medium, group, is_file in zip(media, groups, streamed, strict=True):
        if is_file:
            contents.append(group[0].open())
        else:
            contents.append([read[file] for file in group] if medium.members else read[group[0]])
    return contents


def _is_streamed(media: Media, files: Sequence[MediaFile]) -> bool:
    """Returns whether a medium is one large video file, of which few frames may be far apart."""
    return media.kind == "video" and not media.members and files[0].size > WHOLE_BYTES


def chosen_members(media: Media, plan: MediaPlan) -> list[str]:
    """Returns the members that hold what enters of a medium: its file, or the chosen frames or pages of a list."""
    if not media.members:
        return [media.member]
    return [media.members[index] for index in frame_indices(len(media.members), plan.num_frames)]


def pictures(
    media: Media, plan: MediaPlan, content: Content, images: ImageReader, videos: VideoDecoder
) -> Iterator[Image.Image]:
    """Yields the chosen frames of a video or pages of a document, RGB and upright, one at a time.

    Raises:
        MediaError: if one cannot be decoded.
    """
    if not media.members:
        yield from videos.decode(content, shown_seconds(media, plan.num_frames))
        return
    for name, data in zip(chosen_members(media, plan), content, strict=True):
        try:
            yield images.decode(data)
        except MediaError as error:
            raise MediaError(error.reason, f"{name}: {error.detail}") from error
