"""What a page shows of packed rows: tokens as text, images as the model gets them, and which tokens are learnt."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from eagle_train.data.catalog import Catalog
from eagle_train.data.encode import Encoder
from eagle_train.data.layout import SampleLayout
from eagle_train.data.loader import RowDataset, RowTask
from eagle_train.data.media_text import num_runs
from eagle_train.data.stream import Step
from eagle_train.types import IGNORE_INDEX, Media, MediaPlan, PackedBatch

TILE = 160
"""Longest side of a tile on the page, in pixels."""
MAX_TILES = 32
"""Tiles of one medium that are shown; the number of the rest is said."""
MAX_COLS = 4
"""Resized pictures beside each other."""
MAX_PIECES = 8
"""Tokens that one character may be made of."""
REPLACEMENT = "\ufffd"


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A token, or several that share a character."""

    text: str
    ids: tuple[int, ...]
    raw: str
    """As the vocabulary writes them."""
    learnt: bool
    """Predicted with loss: a label asks for it."""
    special: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """The tiles of an image, or of one frame or page."""

    label: str
    tiles: tuple[str, ...]
    """data: URLs, in the model's order."""
    num_more: int
    cols: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleView:
    """A sample of a row."""

    key: str
    source: str
    num_tokens: int
    num_learnt: int
    weight: float
    """Sum of its loss weights."""
    choices: tuple[str, ...]
    """What was decided for it: frames, grid, thumbnail, what was cut off."""
    parts: tuple[list[Token] | Picture, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowView:
    """A row: its samples, and those of it that turned out bad."""

    number: int
    step: int
    num_tokens: int
    max_length: int
    cost: float
    """Over the mean of its step."""
    num_tiles: int
    num_learnt: int
    samples: tuple[SampleView, ...]
    bad: tuple[tuple[str, str, str], ...] = field(default=())
    """Key, reason, detail."""

    @property
    def fill(self) -> float:
        """Tokens over places."""
        return self.num_tokens / self.max_length


def view_rows(dataset: RowDataset, steps: Iterator[Step], first: int, count: int, max_length: int) -> Iterator[RowView]:
    """Yields the rows `first` to `first + count - 1` of a stage.

    Args:
        steps: from the step that holds the first one on.
    """
    for step in steps:
        for place, samples in enumerate(step.rows):
            number = step.first_row + place
            if number >= first + count:
                return
            if number >= first:
                batch = dataset[RowTask(number, samples)]
                cost = float(step.costs[place] / step.costs.mean())
                yield view_row(dataset.catalog, dataset.encoder, batch, step.number, cost, max_length)


def view_row(
    catalog: Catalog, encoder: Encoder, batch: PackedBatch, step: int, cost: float, max_length: int
) -> RowView:
    """Returns what to show of a row."""
    used = [use for use in batch.uses if use.error is None]
    samples, tile = [], 0
    for place, use in enumerate(used):
        layout = catalog.sizes(use.shard).layout(use.index)
        media = [Media(**medium) for medium in catalog.index_row(use.shard, use.index)["media"]][: len(layout.media)]
        chosen = tuple(choices(encoder, media, layout, max_length))
        pixels = batch.pixels[tile : tile + layout.num_tiles]
        samples.append(view_sample(encoder, batch, place, layout, media, chosen, pixels))
        tile += layout.num_tiles
    return RowView(
        number=batch.row,
        step=step,
        num_tokens=batch.num_tokens,
        max_length=max_length,
        cost=cost,
        num_tiles=batch.num_images,
        num_learnt=sum(sample.num_learnt for sample in samples),
        samples=tuple(samples),
        bad=tuple((error.key, error.reason, error.detail) for _, error in batch.errors),
    )


def view_sample(
    encoder: Encoder,
    batch: PackedBatch,
    place: int,
    layout: SampleLayout,
    media: Sequence[Media],
    chosen: tuple[str, ...],
    pixels: torch.Tensor,
) -> SampleView:
    """Returns what to show of the sample that is number `place` of a row.

    Args:
        media: header facts of its media, in reading order.
        chosen: what was decided for it, in words.
        pixels: (N, *tile_shape) uint8, its tiles.
    """
    start, end = batch.cu_seqlens[place : place + 2].tolist()
    ids, labels = batch.input_ids[start:end], batch.labels[start:end]
    learnt = learnt_tokens(ids, labels, batch.keys[place])
    inside = (batch.image_positions >= start) & (batch.image_positions < end)
    positions = (batch.image_positions[inside] - start).tolist()
    return SampleView(
        key=batch.keys[place],
        source=batch.sources[place],
        num_tokens=end - start,
        num_learnt=sum(learnt),
        weight=float(batch.loss_weights[start:end].sum()),
        choices=chosen,
        parts=tuple(split_parts(encoder, ids.tolist(), learnt, positions, media, layout.media, pixels)),
    )


def learnt_tokens(ids: torch.Tensor, labels: torch.Tensor, key: str) -> list[bool]:
    """Returns which of a sample's tokens are predicted with loss; label t belongs to token t + 1.

    Raises:
        ValueError: if a label asks for another token than the one that follows.
    """
    asked = labels[:-1] != IGNORE_INDEX
    wrong = asked & (labels[:-1] != ids[1:])
    if wrong.any() or labels[-1] != IGNORE_INDEX:
        raise ValueError(f"{key}: {int(wrong.sum())} labels are not the next token; the encoder is at fault")
    return [False, *asked.tolist()]


def choices(encoder: Encoder, media: Sequence[Media], layout: SampleLayout, max_length: int) -> Iterator[str]:
    """Yields what was decided for a sample, in words: of what it asked for, within which budget.

    Args:
        media: header facts of those that stay.
        max_length: tokens of a row.
    """
    asked, asked_tokens = encoder.plan_media(media)
    tokens = sum(
        candidate.tokens(plan) for candidate, plan in zip(encoder.candidates(media), layout.media, strict=True)
    )
    if encoder.degrade.by_budget and media:
        budget = max_length - (layout.num_tokens - tokens)
        yield f"media: {tokens:,} tokens of {budget:,} that text leaves, {asked_tokens:,} asked"
    for number, (medium, plan, wish) in enumerate(zip(media, layout.media, asked, strict=True), 1):
        words, wished = in_words(encoder, medium, plan), in_words(encoder, medium, wish)
        if words or wished:
            more = f" ({wished or 'one tile'} asked)" if plan != wish else ""
            yield f"{medium.kind} {number}: {words or 'one tile'}{more}"
    if layout.lost_turns:
        yield f"cut to fit: {layout.lost_turns} turns, {layout.lost_tokens:,} tokens lost"


def in_words(encoder: Encoder, medium: Media, plan: MediaPlan) -> str:
    """Returns the frames and tiles of a plan in words, of native resolution its pixels; nothing for a single tile."""
    unit = "pages" if medium.kind == "document" else "frames"
    parts = [f"{plan.num_frames} of {medium.num_frames} {unit}"] if medium.kind != "image" else []
    if encoder.tiling.tile_depth:
        parts.append(f"{plan.cols * encoder.tile_size} x {plan.rows * encoder.tile_size} px")
    elif plan.rows * plan.cols > 1:
        parts.append(f"{plan.rows} x {plan.cols} tiles")
    return ", ".join([*parts, "thumbnail"] if plan.thumbnail else parts)


def split_parts(
    encoder: Encoder,
    ids: Sequence[int],
    learnt: Sequence[bool],
    positions: Sequence[int],
    media: Sequence[Media],
    plans: Sequence[MediaPlan],
    pixels: torch.Tensor,
) -> Iterator[list[Token] | Picture]:
    """Yields the text and the pictures of a sample in the order the model reads them."""
    at, tile, place = 0, 0, 0
    for number, (medium, plan) in enumerate(zip(media, plans, strict=True), 1):
        runs = num_runs(encoder.template.media, medium, plan.num_frames)
        per_run = plan.num_tiles // runs
        for run in range(1, runs + 1):
            first = positions[place]
            if at < first:
                yield spell(encoder.tokenizer, ids[at:first], learnt[at:first])
            label = f"{medium.kind} {number}"
            if medium.kind != "image" and runs == plan.num_frames:
                label += f", {'page' if medium.kind == 'document' else 'frame'} {run} of {runs}"
            num_tokens = per_run * encoder.tokens_per_tile
            views = list(encoder.tiling.views(pixels[tile : tile + per_run].numpy(), plan))
            yield picture(label, views, MAX_COLS if encoder.tiling.tile_depth else plan.cols, num_tokens)
            tile, place, at = tile + per_run, place + num_tokens, first + num_tokens
    if at < len(ids):
        yield spell(encoder.tokenizer, ids[at:], learnt[at:])


def spell(tokenizer, ids: Sequence[int], learnt: Sequence[bool]) -> list[Token]:
    """Returns tokens with the text that each adds; those that share a character stand together."""
    special = set(tokenizer.added_tokens_decoder)
    tokens: list[Token] = []
    before: list[int] = []  # SentencePiece drops the space of a first piece, so each is read after the one before
    at = 0
    while at < len(ids):
        prefix = decode(tokenizer, before)
        for end in range(at + 1, min(len(ids), at + MAX_PIECES) + 1):
            text = decode(tokenizer, [*before, *ids[at:end]])[len(prefix) :]
            if REPLACEMENT not in text:
                break
        else:
            end = at + 1  # bytes that are no character, whatever follows
            text = decode(tokenizer, [*before, ids[at]])[len(prefix) :]
        here = tuple(ids[at:end])
        tokens.append(
            Token(
                text=text,
                ids=here,
                raw=" ".join(map(str, tokenizer.convert_ids_to_tokens(list(here)))),
                learnt=any(learnt[at:end]),
                special=here[0] in special,
            )
        )
        before, at = list(here), end
    return tokens


def decode(tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of tokens, special ones and spaces included."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def picture(label: str, views: Sequence[np.ndarray], cols: int, num_tokens: int) -> Picture:
    """Returns what there is to see of a run of visual tokens, (3, height, width) uint8 each, for the page."""
    return Picture(
        label=label,
        tiles=tuple(data_url(view) for view in views[:MAX_TILES]),
        num_more=max(0, len(views) - MAX_TILES),
        cols=cols,
        num_tokens=num_tokens,
    )


def data_url(view: np.ndarray) -> str:
    """Returns a picture (3, height, width) uint8 as a data: URL, made smaller if it is large."""
    image = Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))
    image.thumbnail((TILE, TILE))
    buffer = io.BytesIO()
    kind = "png" if max(view.shape[1:]) <= TILE // 2 else "jpeg"  # small ones lose too much
    image.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
