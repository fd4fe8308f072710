"""Members of a WebDataset sample that stand for the media which its record names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from eagle_train.data.media_sources import named
from eagle_train.data.placeholders import MediaRef
from eagle_train.types import SampleError


def find_members(
    ref: MediaRef,
    refs: Sequence[MediaRef],
    members: Mapping[str, bytes],
    media: Sequence[MediaRef],
    key: str,
    elsewhere: Callable[[str], bool],
) -> MediaRef:
    """Returns `ref` with the members that it means among the `members`, of which `media` are images and videos.

    Args:
        elsewhere: whether a path or address that no member stands for may be kept.

    Raises:
        SampleError: `missing_media`.
    """
    names = [find_member(path, members, key) for path in ref.paths]
    alike = [other.ref for other in media if other.kind == ref.kind]
    if names == [None] and len(alike) == 1 and sum(other.kind == ref.kind for other in refs) == 1:
        names = alike
    names = [path if name is None and elsewhere(path) else name for name, path in zip(names, ref.paths, strict=True)]
    if None in names:
        lost = ref.paths[names.index(None)]
        detail = (
            f"{ref.kind} {named(lost)} is not among the members {sorted(members)}; files of this machine are read only "
            f"below a media_root, which the dataset card or `data build` is given"
        )
        raise SampleError(key, "missing_media", detail)
    if (*names,) == ref.paths:
        return ref
    return replace(ref, refs=tuple(names)) if ref.refs else replace(ref, ref=names[0])


def find_member(path: str, members: Mapping[str, bytes], key: str) -> str | None:
    """Returns the member that a path means: of that name, or of that file name (`<key>.jpg`)."""
    for name in (path, path.lower()):
        if name in members:
            return name
    file_stem, _, file_extension = PurePosixPath(path).name.lower().partition(".")
    is_own_file = file_stem == PurePosixPath(key).name.lower()
    return file_extension if is_own_file and file_extension in members else None
