"""Media outside of shards, as a question brings them: their bytes and header facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from eagle_train.data.frames import frame_indices
from eagle_train.data.images import probe_image
from eagle_train.data.media import MediaError
from eagle_train.data.media_content import Content
from eagle_train.data.media_files import read_media_file
from eagle_train.data.placeholders import MediaRef
from eagle_train.data.probe import DEFAULT_FPS, cut_clip, largest
from eagle_train.data.videos import probe_video
from eagle_train.types import Media, MediaPlan, SampleError


def load_medium(ref: MediaRef, key: str) -> tuple[Media, list[bytes]]:
    """Returns the header facts of a medium, and the bytes of each of its files.

    Args:
        ref: of a path from the working folder, or an address, see `media_sources`.
        key: names the question in errors.

    Raises:
        SampleError: for a file that is missing or unreadable, or a clip with nothing of its file.
    """
    contents = [read_media_file(file, None, key) for file in ref.files]
    try:
        media = facts_of(ref, contents, key)
    except MediaError as error:
        raise SampleError(key, error.reason, error.detail) from error
    alone = not ref.refs and not ref.ref.startswith("data:")
    name = {"member": PurePosixPath(ref.ref).name} if alone else {}  # for errors
    return replace(media, **name, **dict(ref.limits)), contents


def facts_of(ref: MediaRef, contents: Sequence[bytes], key: str) -> Media:
    """Returns the header facts of a medium, but for the sizes that the record asks for.

    Raises:
        MediaError: if it is unreadable.
    """
    if not ref.refs and ref.kind == "video":
        return cut_clip(Media(kind="video", member="0", **probe_video(contents[0])._asdict()), ref.start, ref.end, key)
    headers = [probe_image(data) for data in contents]
    if not ref.refs:
        return Media(kind="image", member="0", **largest(headers))
    return Media(
        kind=ref.kind,
        members=tuple(str(index) for index in range(len(contents))),
        **largest(headers),
        duration=len(contents) / (ref.fps or DEFAULT_FPS) if ref.kind == "video" else 0.0,
        num_frames=len(contents),
    )


def chosen_content(media: Media, plan: MediaPlan, contents: Sequence[bytes]) -> Content:
    """Returns what of a medium's files enters: all of a file, the chosen frames or pages of a list."""
    if not media.members:
        return contents[0]
    return [contents[index] for index in frame_indices(len(contents), plan.num_frames)]
