"""Text and media of a sample as one sequence of ids, the same for training and inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eagle_train.data.chat import TextRun, backend_of
from eagle_train.data.media_text import MediaText, medium_texts, places
from eagle_train.types import Media, MediaKind, MediaPlan


def interleave(
    items: Sequence[TextRun | int],
    media: Sequence[Media],
    plans: Sequence[MediaPlan],
    *,
    strings: MediaText,
    tokenizer,
    tokens_per_tile: int,
    filler_ids: Mapping[MediaKind, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids (T,) int64, targets (T,) bool and image positions (M,) int64 of text runs and media between.

    Args:
        items: text, and the numbers of the media between.
        media, plans: all media of the sample, in reading order.
        strings: what surrounds visual tokens.
        tokenizer: a fast transformers tokenizer.
        tokens_per_tile: visual tokens of one tile after the projector.
        filler_ids: written at image positions, by kind of medium.
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
        run = plan.num_tiles * tokens_per_tile // (len(texts) - 1)
        ids.append(medium_ids(texts, run, tokenizer, filler_ids[media[item].kind]))
        targets.append(np.zeros(len(ids[-1]), bool))
    input_ids = np.concatenate(ids)
    (positions,) = (input_ids < 0).nonzero()
    input_ids[positions] = ~input_ids[positions]
    return input_ids, np.concatenate(targets), positions


def medium_ids(texts: Sequence[str], run: int, tokenizer, filler_id: int) -> np.ndarray:
    """Returns (t,) int64: the ids of texts, each tokenized on its own, with `run` visual tokens between two.

    A visual token is the complement of the id that fills its place, ~id, so that it is told from text.
    """
    visual = np.full(run, ~filler_id)
    if len(texts) == 2 and not any(texts):  # most templates have none around images
        return visual
    encode = backend_of(tokenizer).encode
    parts = []
    for text in texts:
        if text:
            parts.append(np.array(encode(text, add_special_tokens=False).ids, np.int64))
        parts.append(visual)
    return np.concatenate(parts[:-1])
