"""Text and media of a sample as one sequence of ids, the same for training and inference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eagle_train.data.chat import TextRun, backend_of
from eagle_train.data.media_text import MediaText, medium_texts, places
from eagle_train.types import Media, MediaPlan

VISUAL = -1
"""Stands for a visual token while a sample is laid out; no token id."""


def interleave(
    items: Sequence[TextRun | int],
    media: Sequence[Media],
    plans: Sequence[MediaPlan],
    *,
    strings: MediaText,
    tokenizer,
    tokens_per_tile: int,
    image_id: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids (T,) int64, targets (T,) bool and image positions (M,) int64 of text runs and media between.

    Args:
        items: text, and the numbers of the media between.
        media, plans: all media of the sample, in reading order.
        strings: what surrounds visual tokens.
        tokenizer: a fast transformers tokenizer.
        tokens_per_tile: visual tokens of one tile after the projector.
        image_id: written at image positions.
    """
    where = places(media)
    ids: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for item in items:
        if isinstance(item, TextRun):
            ids.append(item.ids)
            targets.append(item.is_target)
            continue
        plan = plans[item]
        texts = medium_texts(strings, media[item], where[item], plan.num_frames)
        ids.append(medium_ids(texts, plan.num_tiles // plan.num_frames * tokens_per_tile, tokenizer))
        targets.append(np.zeros(len(ids[-1]), bool))
    input_ids = np.concatenate(ids)
    (positions,) = (input_ids == VISUAL).nonzero()
    input_ids[positions] = image_id
    return input_ids, np.concatenate(targets), positions


def medium_ids(texts: Sequence[str], frame_tokens: int, tokenizer) -> np.ndarray:
    """Returns (t,) int64: the ids of texts, each tokenized on its own, with `frame_tokens` of `VISUAL` between two."""
    encode = backend_of(tokenizer).encode
    visual = np.full(frame_tokens, VISUAL)
    parts = []
    for text in texts:
        if text:  # most templates have none around images
            parts.append(np.array(encode(text, add_special_tokens=False).ids, np.int64))
        parts.append(visual)
    return np.concatenate(parts[:-1])
