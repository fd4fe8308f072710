"""Media as annotations name them, and where in a conversation they go: placeholders, slots, messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from eagle_train.types import MediaKind, Message, Role, SampleError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2"})
VIDEO_SUFFIXES = frozenset({"mp4", "avi", "mov", "mkv", "webm", "m4v", "mpg", "mpeg", "flv", "wmv", "3gp"})

PLACEHOLDER = re.compile(r"<(image|video|document)(?:-(\d{1,6}))?>")


@dataclass(frozen=True, slots=True)
class MediaRef:
    """An image, video or document as the annotation names it."""

    kind: MediaKind
    ref: str = ""
    """A path, or a tar member's extension; empty where `refs` name its files."""
    refs: tuple[str, ...] = ()
    """Of a list of frames or pages, in order: paths of images, or extensions of tar members."""
    start: float = 0.0
    """Seconds from the first frame of a video file to a clip of it; 0 with an `end` of 0 for the whole file."""
    end: float = 0.0
    """Seconds; 0 for the end of the file."""
    fps: float | None = None
    """Frames per second of `refs`, where it is told."""
    limits: tuple[tuple[str, int | float], ...] = ()
    """Sizes in pixels and numbers of frames that the record asks for: (field of `types.Media`, number) pairs; see
    `media_fields`."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Its files, in order."""
        return self.refs or (self.ref,)

    @property
    def files(self) -> tuple[MediaRef, ...]:
        """Each of its files as a medium: itself, or the images that it is a list of."""
        return tuple(MediaRef("image", path) for path in self.refs) or (self,)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a listed medium: number `number` (from 1) of the list `name`, or the next one of it."""

    name: str
    """`image`, `video`, `document`, or `media` (the canonical record's common list)."""
    number: int | None = None


Part = str | MediaRef | Slot
Turn = tuple[Role, list[Part]]
Listed = dict[str, list[MediaRef]]
"""The media listed beside a conversation, by the name of the slots that take them."""


def media_kind(name: str) -> MediaKind | None:
    """Returns what a name of a file, member or address ends like, or a `data:` address says: image, video, or None."""
    suffix = file_suffix(name)
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None


def file_suffix(name: str) -> str:
    """Returns the last suffix of the name of a file, member or address, or the type that a `data:` address says."""
    if name.startswith("data:"):
        return name[5:64].partition(";")[0].rpartition("/")[2].lower()
    if name.startswith(("http://", "https://")):
        name = re.split(r"[?#]", name, maxsplit=1)[0]
    return name.rpartition(".")[2].lower()


def place_listed(turns: Sequence[Turn], listed: Listed) -> tuple[list[Turn], Listed]:
    """Returns the turns with slots in place of the placeholders, and the lists that the slots take from.

    Without any placeholder the media go before the first user turn's text, each followed by a newline.
    LLaVA-Video writes `<image>` for videos: accepted where only videos are listed. `<document>` is a placeholder only
    where documents are listed; elsewhere prompts use it as a tag.

    Args:
        turns: turns whose parts are all text, one of them the user's.
        listed: the media, at least one.
    """
    placed: list[Turn] = [
        (role, [piece for text in content for piece in _split(text, "document" in listed)]) for role, content in turns
    ]
    names = {part.name for _, content in placed for part in content if isinstance(part, Slot)}
    if not names:
        first = next(content for role, content in placed if role == "user")
        slots: list[Part] = [part for name, refs in listed.items() for _ in refs for part in (Slot(name), "\n")]
        first[:0] = slots if any(first) else slots[:-1]
    if names == {"image"} and set(listed) == {"video"}:
        return placed, {"image": listed["video"]}
    return placed, listed


def _split(text: str, has_documents: bool) -> list[Part]:
    """Returns the text with slots in place of its placeholders."""
    if "<" not in text:
        return [text]
    pieces: list[Part] = []
    end = 0
    for match in PLACEHOLDER.finditer(text):
        if match[1] == "document" and not has_documents:
            continue
        pieces += [text[end : match.start()], Slot(match[1], int(match[2]) if match[2] else None)]
        end = match.end()
    return [*pieces, text[end:]]


def fill_slots(turns: Sequence[Turn], listed: Listed, key: str) -> tuple[tuple[Message, ...], tuple[MediaRef, ...]]:
    """Returns the messages with a medium in every slot, and the media in reading order.

    Neighbouring texts are joined, empty ones dropped.

    Raises:
        SampleError: `placeholder_mismatch`, unless every listed medium has exactly one slot.
    """
    _check_slots([part for _, content in turns for part in content if isinstance(part, Slot)], listed, key)
    rest = {name: iter(refs) for name, refs in listed.items()}
    media: list[MediaRef] = []
    messages = []
    for role, content in turns:
        parts: list[str | int] = []
        for part in content:
            if isinstance(part, str):
                if part and parts and isinstance(parts[-1], str):
                    parts[-1] += part
                elif part:
                    parts.append(part)
                continue
            parts.append(len(media))
            if isinstance(part, MediaRef):
                media.append(part)
            else:
                media.append(listed[part.name][part.number - 1] if part.number else next(rest[part.name]))
        messages.append(Message(role=role, content=tuple(parts)))
    return tuple(messages), tuple(media)


def _check_slots(slots: Sequence[Slot], listed: Listed, key: str) -> None:
    """Raises SampleError unless the slots of every list are as many as its media, or number each of them once."""
    for name in sorted({*listed, *(slot.name for slot in slots)}):
        numbers = [slot.number for slot in slots if slot.name == name]
        count = len(listed.get(name, []))
        numbered = numbers.count(None) < len(numbers)
        if len(numbers) != count or (numbered and set(numbers) != set(range(1, count + 1))):
            how = f" (numbered {numbers})" if numbered else ""
            detail = f"{len(numbers)} {name} placeholders{how}, {count} {name} entries listed; each needs exactly one"
            raise SampleError(key, "placeholder_mismatch", detail)
