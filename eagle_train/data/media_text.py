"""The text that belongs to media: tags, opening sentences, frame labels. One formatter for training and inference.

The strings are values of a template. What they give depends on header facts and the plan alone, and is tokenized apart
from the text around, so that the length of a medium is an exact function of its plan (see `media_costs`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from eagle_train.data.frames import frame_indices, label_seconds
from eagle_train.types import Media

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
"""As the release has them; those beyond are digits."""
FIELDS = {
    "image": {"number": 1},
    "images": {"number": 1},
    "video": {"number": 1, "ordinal": "first", "duration": 1.0, "fps": 1.0},
    "video_untimed": {"number": 1, "ordinal": "first"},
    "frame": {"number": 1, "seconds": 1.0},
    "frame_untimed": {"number": 1},
    "document": {"number": 1, "ordinal": "first", "pages": 1},
    "page": {"number": 1},
}
"""What the format strings may name, with values of the right type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaText:
    """The strings around visual tokens; those of `FIELDS` are format strings.

    Args:
        prefix, suffix: around the tokens of every image, frame and page: one pair for all tiles of an image.
        image: before the only image of a sample.
        images: before each of several, `{number}` from 1.
        video, frame: before all frames and before each; `{number}` of the video or frame from 1, `{ordinal}` the same
            in words, `{duration}` in seconds, `{fps}` of the chosen frames, `{seconds}` from the start to the frame.
        video_untimed, frame_untimed: the same for frames whose times nobody knows.
        document, page: before all pages and before each; `{pages}` is how many there are, a page's `{number}` its own
            in the document, of which some may be left out.
        separator: between two frames or pages.
        whole_video: a video is one run of visual tokens, with one prefix and suffix around it and no labels between.
    """

    prefix: str = ""
    suffix: str = ""
    image: str = ""
    images: str = ""
    video: str = ""
    frame: str = ""
    video_untimed: str = ""
    frame_untimed: str = ""
    document: str = ""
    page: str = ""
    separator: str = ""
    whole_video: bool = False

    def __post_init__(self) -> None:
        for name, values in FIELDS.items():
            try:
                getattr(self, name).format(**values)
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(f"{name} {getattr(self, name)!r} may name {', '.join(values)}: {error}") from error


@dataclass(frozen=True, slots=True)
class Place:
    """Where a medium stands among those of its kind in a sample."""

    number: int
    """From 1."""
    alone: bool


def places(media: Sequence[Media]) -> list[Place]:
    """Returns the place of each medium of a sample."""
    if len(media) == 1:
        return [Place(1, True)]
    totals, seen = Counter(medium.kind for medium in media), Counter()
    found = []
    for medium in media:
        seen[medium.kind] += 1
        found.append(Place(seen[medium.kind], totals[medium.kind] == 1))
    return found


def is_whole(strings: MediaText, medium: Media) -> bool:
    """Returns whether a medium is a video that is one run of visual tokens."""
    return medium.kind == "video" and strings.whole_video


def num_runs(strings: MediaText, medium: Media, num_frames: int) -> int:
    """Returns how many runs of visual tokens a medium has, text between them."""
    return 1 if medium.kind == "image" or is_whole(strings, medium) else num_frames


def medium_texts(strings: MediaText, medium: Media, place: Place, num_frames: int) -> list[str]:
    """Returns the text before each run of visual tokens of a medium, and after the last: `num_runs` + 1 texts."""
    if medium.kind == "image":
        label = strings.image if place.alone else strings.images
        return [label.format(number=place.number) + strings.prefix, strings.suffix]
    if is_whole(strings, medium):
        return [opening(strings, medium, place, num_frames) + strings.prefix, strings.suffix]
    labels = [label + strings.prefix for label in frame_labels(strings, medium, num_frames)]
    between = strings.suffix + strings.separator
    first, *others = labels
    opened = opening(strings, medium, place, num_frames) + first
    return [opened, *(between + label for label in others), strings.suffix]


def opening(strings: MediaText, medium: Media, place: Place, num_frames: int) -> str:
    """Returns what comes before all frames or pages."""
    ordinal = ORDINALS[place.number - 1] if place.number <= len(ORDINALS) else str(place.number)
    named = {"number": place.number, "ordinal": ordinal}
    if medium.kind == "document":
        return strings.document.format(**named, pages=medium.num_frames)
    if not medium.duration:
        return strings.video_untimed.format(**named)
    return strings.video.format(**named, duration=medium.duration, fps=num_frames / medium.duration)


def frame_labels(strings: MediaText, medium: Media, num_frames: int) -> list[str]:
    """Returns what comes before each frame or page."""
    if medium.kind == "document":
        return [strings.page.format(number=i + 1) for i in frame_indices(medium.num_frames, num_frames)]
    numbers = range(1, num_frames + 1)
    if not medium.duration:
        return [strings.frame_untimed.format(number=number) for number in numbers]
    seconds = label_seconds(medium, num_frames)
    return [strings.frame.format(number=n, seconds=s) for n, s in zip(numbers, seconds, strict=True)]
