"""How many tokens a medium takes under a plan: exactly what encoding gives, without tokenizing every label."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from eagle_train.data.degrade import Candidate
from eagle_train.data.frames import frame_indices, label_seconds
from eagle_train.data.images import ImageReader
from eagle_train.data.media_text import MediaText, Place, is_whole, medium_texts, opening, places
from eagle_train.data.number_costs import NumberCosts
from eagle_train.data.tiling import Tiling
from eagle_train.types import Media, MediaPlan

FIXED = re.compile(r"\.([0-9])f")
"""How a label may write seconds: with so many decimals."""
NEAR_HALF = 1e-6


@dataclass(frozen=True, slots=True)
class Label:
    """What precedes all frames but the first, in parts whose tokens add up."""

    fixed: int
    """Tokens with zeros in place of all numbers."""
    fields: tuple[tuple[str, int], ...]
    """The numbers: the name of each, and its decimals."""


class MediaCosts:
    """Counts the tokens of media.

    Args:
        strings: what surrounds the visual tokens.
        tokenizer: a fast transformers tokenizer.
        tokens_per_tile: visual tokens of one tile after the projector.
    """

    def __init__(self, strings: MediaText, tokenizer, tokens_per_tile: int) -> None:
        self._strings = strings
        self._tokens_per_tile = tokens_per_tile
        self._texts = NumberCosts(tokenizer)
        self._suffix = self._texts.count(strings.suffix)
        self._labels = {
            name: self._parse(getattr(strings, name)) if self._texts.apart else None
            for name in ("frame", "frame_untimed", "page")
        }

    def tokens(self, medium: Media, place: Place, plan: MediaPlan) -> int:
        """Returns the tokens that a medium adds to the text of its sample."""
        visual = plan.num_tiles * self._tokens_per_tile
        name = label_of(medium)
        label = None if is_whole(self._strings, medium) else self._labels.get(name)
        if label is None:
            texts = medium_texts(self._strings, medium, place, plan.num_frames)
            return visual + sum(self._texts.count(text) for text in texts)
        numbers, seconds = shown(medium, plan.num_frames)
        first = {"number": int(numbers[0]), "seconds": float(seconds[0])}
        opened = opening(self._strings, medium, place, plan.num_frames)
        opened += getattr(self._strings, name).format(**first) + self._strings.prefix
        others = label.fixed * (plan.num_frames - 1)
        others += int(self._sum(label, numbers[1:], seconds[1:], self._texts.extras).sum())
        return visual + self._texts.count(opened) + others + self._suffix

    def at_least(self, medium: Media, plan: MediaPlan) -> np.ndarray:
        """Returns (n + 1,) int64: no fewer tokens does a video or document take with 0, 1, ... of a plan's n frames.

        Frame i of few has a later time, and page i of few a higher number, than that of many. So what the labels of
        all frames take bounds those of fewer, and closely the next ones.
        """
        step = plan.num_tiles // plan.num_steps * self._tokens_per_tile
        least = np.zeros(plan.num_frames, np.int64)
        least[:: plan.frames_per_tile] = step
        if not is_whole(self._strings, medium) and (label := self._labels[label_of(medium)]):
            least += label.fixed + self._sum(label, *shown(medium, plan.num_frames), self._texts.least_extras)
        return np.concatenate([[0], np.cumsum(least)])

    def _sum(self, label: Label, numbers: np.ndarray, seconds: np.ndarray, extras: Callable) -> np.ndarray:
        """Returns (n,) int64: the tokens of the numbers of each label beyond those of zeros."""
        total = np.zeros(len(numbers), np.int64)
        for name, decimals in label.fields:
            if name == "number":
                total += extras(numbers)
                continue
            whole, rest = np.divmod(rounded(seconds, decimals), 10**decimals)
            total += extras(whole)
            if decimals:
                total += self._texts.extras(rest, decimals)
        return total

    def _parse(self, label: str) -> Label | None:
        """Returns the parts of a format string; None if numbers stand side by side, by digits or in another form."""
        fields = []
        pieces = [self._strings.suffix + self._strings.separator]
        for text, name, form, conversion in string.Formatter().parse(label):
            pieces[-1] += text
            if name is None:
                continue
            decimals = FIXED.fullmatch(form)
            if conversion or ((name, form) != ("number", "") and not (name == "seconds" and decimals)):
                return None
            fields.append((name, int(decimals[1]) if decimals else 0))
            pieces.append("")
        pieces[-1] += self._strings.prefix
        beside = [text[-1:] for text in pieces[:-1]] + [text[:1] for text in pieces[1:]]
        if "" in pieces[1:-1] or any(character.isdigit() for character in beside):
            return None
        zeros = ["0" + (f".{0:0{decimals}}" if decimals else "") for _, decimals in fields]
        text = pieces[0] + "".join(zero + piece for zero, piece in zip(zeros, pieces[1:], strict=True))
        # The digits after a point are counted from a single zero, as `extras` does, not from all of theirs.
        surplus = sum(int(self._texts.extras(np.zeros(1, np.int64), d)[0]) for _, d in fields if d)
        return Label(self._texts.count(text) - surplus, tuple(fields))


def label_of(medium: Media) -> str:
    """Returns the name of the string that labels the frames or pages of a medium; nothing of an image."""
    if medium.kind == "image":
        return ""
    if medium.kind == "document":
        return "page"
    return "frame" if medium.duration else "frame_untimed"


def shown(medium: Media, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers (n,) int64 and seconds (n,) float64 that the labels of a medium tell."""
    if medium.kind == "document":
        return np.array(frame_indices(medium.num_frames, num_frames)) + 1, np.zeros(num_frames)
    return np.arange(1, num_frames + 1), np.array(label_seconds(medium, num_frames))


def rounded(values: np.ndarray, decimals: int) -> np.ndarray:
    """Returns (n,) int64: the digits of `f"{value:.{decimals}f}"` of each value, as one number."""
    scaled = values * 10**decimals
    found = np.rint(scaled).astype(np.int64)
    # The product may be rounded onto the middle between two; formatting goes by the exact value.
    for place in np.flatnonzero(np.abs(scaled % 1 - 0.5) < NEAR_HALF).tolist():
        found[place] = int(f"{values[place]:.{decimals}f}".replace(".", ""))
    return found


def candidates(media: Sequence[Media], images: ImageReader, tiling: Tiling, costs: MediaCosts) -> list[Candidate]:
    """Returns what a policy must know of the media of a sample.

    Raises:
        MediaError: if `images` refuses one.
    """
    found = []
    for medium, place in zip(media, places(media), strict=True):
        is_image = medium.kind == "image"
        cut = tiling.of(medium)
        # Of pages and frames that are images, too large ones are refused; a video file is no image.
        size = images.size(medium) if is_image or medium.members else (medium.width, medium.height)
        found.append(
            Candidate(
                medium=medium,
                tiles=partial(cut.plan, *size) if is_image else None,
                frames=None if is_image else partial(cut.plan_frames, medium, size),
                tokens=partial(costs.tokens, medium, place),
                at_least=None if is_image else partial(costs.at_least, medium),
            )
        )
    return found
