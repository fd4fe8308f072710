"""The media of an annotation as its fields give them: files, clips of files, and lists of frames or pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from eagle_train.data.json_fields import bad_record, objects, text
from eagle_train.data.media_sources import inline
from eagle_train.data.placeholders import Listed, MediaRef, file_suffix, media_kind
from eagle_train.types import MediaKind

MEDIA_KEYS: Mapping[str, MediaKind] = {
    "image": "image", "images": "image", "image_list": "image", "video": "video", "videos": "video",
    "video_list": "video", "document": "document", "documents": "document", "document_list": "document",
}  # fmt: skip
MEDIA_LISTS = (*MEDIA_KEYS, "data", "media")
NO_MEDIA = frozenset({"", "none", "nan"})
"""What some sets (Cambrian) write for "no image"."""

FILE_FIELDS = ("path", "video", "member", "url")
LIST_FIELDS = ("frames", "pages", "images", "image_list", "members")
START_FIELDS = ("start", "start_time", "video_start")
END_FIELDS = ("end", "end_time", "video_end")
PIXEL_FIELDS = ("min_pixels", "max_pixels", "resized_width", "resized_height")
"""Sizes that Qwen's messages may ask for, of one medium; `types.Media` has them by the same names."""
RATE_FIELDS = ("fps", "sample_fps")
"""Of frames that are given as images, their rate; of a file, the one that its frames are taken at."""
FRAME_FIELDS = ("nframes", "min_frames", "max_frames", "total_pixels")
"""Numbers that they may ask for, of a video."""
SIZE_FIELDS = (*PIXEL_FIELDS, "total_pixels")
"""Those of a picture, which models of tiles do not follow."""
VIDEO_FIELDS = (*START_FIELDS, *END_FIELDS, *RATE_FIELDS, *FRAME_FIELDS)
KNOWN_FIELDS = frozenset({*FILE_FIELDS, *LIST_FIELDS, *PIXEL_FIELDS, *VIDEO_FIELDS, "kind", "bytes"})


def listed_media(record: Mapping[str, Any], key: str) -> tuple[Listed, set[str]]:
    """Returns the media that a record lists beside the conversation, and the keys that list them.

    Raises:
        SampleError: `bad_record` for what is no medium, or two lists of one kind.
    """
    used = {name for name in MEDIA_LISTS if name in record}
    found = [(name, MEDIA_KEYS[name], record[name]) for name in MEDIA_KEYS if name in used]
    # Eagle 2.5: [{"type": "image", "image_list": [...]}, {"type": "video", "video_list": [...]}]
    for group in objects(record["data"], key, "data") if "data" in used else ():
        found += [(f"data.{name}", kind, group[name]) for name, kind in MEDIA_KEYS.items() if name in group]
    listed: Listed = {}
    for name, kind, value in found:
        if refs := read_media(value, kind, key, name):
            if kind in listed:
                raise bad_record(
                    key, f"more than one list of {kind}s: {', '.join(n for n, k, _ in found if k == kind)}"
                )
            listed[kind] = refs
    for medium in objects(record["media"], key, "media") if "media" in used else ():
        if medium.get("kind") not in ("image", "video", "document"):
            raise bad_record(key, f"media kind {medium.get('kind')!r}; known are 'image', 'video' and 'document'")
        listed.setdefault("media", []).append(read_medium(medium, medium["kind"], key, "media member"))
    return listed, used


def read_media(value: Any, kind: MediaKind, key: str, name: str) -> list[MediaRef]:
    """Returns the media of one field: one of them, a list, or nothing in any of its spellings.

    A list of image paths is one video (its frames) or one document (its pages); a list of such lists is several.

    Args:
        value: of the field `name`.

    Raises:
        SampleError: `bad_record`.
    """
    if value is None or value != value or (isinstance(value, str) and value.strip().lower() in NO_MEDIA):
        return []  # NaN is the one JSON value that differs from itself
    if not isinstance(value, list):
        return [read_medium(value, kind, key, name)]
    if kind != "image" and value and all(is_picture(item, kind) for item in value):
        return [read_medium(value, kind, key, name)]
    return [read_medium(item, kind, key, name) for item in value]


def is_picture(item: Any, kind: MediaKind) -> bool:
    """Returns whether an entry of a list is a frame of a video or a page: a picture, but a GIF is a video itself."""
    if not isinstance(item, str) or media_kind(item) != "image":
        return False
    return kind != "video" or file_suffix(item) != "gif"


def read_medium(value: Any, kind: MediaKind, key: str, name: str) -> MediaRef:
    """Returns one medium: a path, a list of image paths, or an object with either and what is asked of it.

    Raises:
        SampleError: `bad_record`.
    """
    if not isinstance(value, Mapping):
        return _reference(kind, value, key, name)
    if "lmdb_file" in value:
        raise bad_record(key, f"{name} is a value of the LMDB {value['lmdb_file']!r}; write it to a file and name that")
    if unknown := sorted(map(str, value.keys() - KNOWN_FIELDS)):
        raise bad_record(key, f"{name} has the keys {unknown}; known are {sorted(KNOWN_FIELDS)}")
    if isinstance(value.get("bytes"), bytes):  # as Hugging Face's datasets give images, with the path they had
        value = {name: item for name, item in value.items() if name not in FILE_FIELDS} | {"path": value["bytes"]}
    places = [field for field in (*FILE_FIELDS, *LIST_FIELDS) if value.get(field) is not None]
    if len(places) != 1:
        raise bad_record(key, f"{name} holds {repr(value)[:80]}; it names its file, frames or pages in one field")
    ref = _reference(kind, value[places[0]], key, name)
    start, end = _bound(value, START_FIELDS, key, name), _bound(value, END_FIELDS, key, name)
    if (start is not None or end is not None) and (kind != "video" or ref.refs):
        raise bad_record(key, f"{name} has a start or an end; only a video file has clips")
    if end is not None and end <= (start or 0.0):
        raise bad_record(key, f"{name} is a clip from {start or 0.0} s to {end} s; the end must be after the start")
    asked = read_limits(value, key, name) + read_frame_wishes(value, kind, key, name)
    fps = _rate(value, kind, key, name)
    if fps is not None and not ref.refs:
        asked, fps = (*asked, ("fps", fps)), None
    if {"fps", "nframes"} <= dict(asked).keys():
        raise bad_record(key, f"{name} has {dict(asked)}; a video is sampled by fps or by nframes, give one of them")
    return replace(ref, start=start or 0.0, end=end or 0.0, fps=fps, limits=asked)


def read_limits(value: Mapping[str, Any], key: str, name: str) -> tuple[tuple[str, int], ...]:
    """Returns the sizes in pixels that a medium asks for, by field.

    Raises:
        SampleError: `bad_record` for what is no whole number above 0, a minimum above its maximum, or one side alone.
    """
    limits = {field: value[field] for field in PIXEL_FIELDS if value.get(field) is not None}
    if wrong := {field: number for field, number in limits.items() if not _is_count(number)}:
        raise bad_record(key, f"{name} has {wrong}; each is a whole number of pixels, at least 1")
    if limits.get("min_pixels", 0) > limits.get("max_pixels", math.inf):
        raise bad_record(key, f"{name} has min_pixels {limits['min_pixels']} above max_pixels {limits['max_pixels']}")
    if ("resized_width" in limits) != ("resized_height" in limits):
        raise bad_record(key, f"{name} has {limits}; resized_width and resized_height are given together")
    return tuple(limits.items())


def read_frame_wishes(value: Mapping[str, Any], kind: MediaKind, key: str, name: str) -> tuple[tuple[str, int], ...]:
    """Returns the numbers of frames, and of their pixels, that a video asks for, by field.

    Raises:
        SampleError: `bad_record` for what is no whole number above 0, a minimum above its maximum, or no video.
    """
    asked = {field: value[field] for field in FRAME_FIELDS if value.get(field) is not None}
    if asked and kind != "video":
        raise bad_record(key, f"{name} has {asked}; only a video has frames")
    if wrong := {field: number for field, number in asked.items() if not _is_count(number)}:
        raise bad_record(key, f"{name} has {wrong}; each is a whole number, at least 1")
    if asked.get("min_frames", 0) > asked.get("max_frames", math.inf):
        raise bad_record(key, f"{name} has min_frames {asked['min_frames']} above max_frames {asked['max_frames']}")
    return tuple(asked.items())


def medium_fields(ref: MediaRef, members: Sequence[str]) -> dict[str, Any]:
    """Returns the canonical json of a medium that is stored as `members`; `read_medium` reads it back."""
    if ref.refs:
        rate = {} if ref.fps is None else {"fps": ref.fps}
        return {"kind": ref.kind, "members": list(members), **rate, **dict(ref.limits)}
    (member,) = members
    bounds = {name: value for name, value in (("start", ref.start), ("end", ref.end)) if value}
    return {"kind": ref.kind, "member": member, **bounds, **dict(ref.limits)}


def _is_count(number: Any) -> bool:
    """Returns whether a value is a whole number above 0 that an index can hold."""
    return type(number) is int and 1 <= number < 1 << 31


def _rate(value: Mapping[str, Any], kind: MediaKind, key: str, name: str) -> float | None:
    """Returns the frames a second that a medium has or asks for, if any; Qwen's messages may give a string."""
    if isinstance(number := value.get("sample_fps"), str):
        with suppress(ValueError):  # `_bound` names it
            value = {**value, "sample_fps": float(number)}
    fps = _bound(value, RATE_FIELDS, key, name)
    if fps is not None and (kind != "video" or fps <= 0):
        raise bad_record(key, f"{name} has fps {fps}; it is a rate above 0, of a video")
    return fps


def _reference(kind: MediaKind, value: Any, key: str, name: str) -> MediaRef:
    """Returns a medium that is given by a path or a list of image paths alone."""
    if isinstance(value, list) and kind != "image" and value:
        return MediaRef(kind, refs=tuple(_path(item, key, name) for item in value))
    if kind == "document":
        raise bad_record(key, f"{name} holds {repr(value)[:80]}; a document is the list of its pages as image files")
    return MediaRef(kind, _path(value, key, name))


def _path(value: Any, key: str, name: str) -> str:
    """Returns `value` if it is a path or an address; of raw bytes, an address that holds them."""
    if isinstance(value, bytes):
        return inline(value)
    if not isinstance(value, str) or not value.strip():
        raise bad_record(key, f"{name} holds {repr(value)[:80]}; media are named by path strings")
    return text(value, key, name)


def _bound(value: Mapping[str, Any], fields: Sequence[str], key: str, name: str) -> float | None:
    """Returns the number in the one of `fields` that is given, if any."""
    given = [(field, value[field]) for field in fields if value.get(field) is not None]
    if not given:
        return None
    field, number = given[0]
    if len(given) > 1 or type(number) not in (int, float) or not math.isfinite(number) or number < 0:
        raise bad_record(
            key, f"{name} has {dict(given)}; {field} is one number, at least 0 (seconds, or frames a second)"
        )
    return float(number)
