"""A sample becomes token ids, shifted labels, loss weights and pixels; its length is known from headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from eagle_train.data.chat import ChatTemplate, TextRun
from eagle_train.data.degrade import Candidate, Degrade
from eagle_train.data.images import ImageReader
from eagle_train.data.interleave import interleave
from eagle_train.data.loss_weights import LossWeight
from eagle_train.data.media import MediaError
from eagle_train.data.media_content import Content, pictures
from eagle_train.data.media_costs import MediaCosts, candidates
from eagle_train.data.media_text import num_runs
from eagle_train.data.positions import Positions, sequential
from eagle_train.data.row_buffers import row_bytes
from eagle_train.data.text_tokens import TextTokens
from eagle_train.data.tiling import Tiling
from eagle_train.data.video_frames import VideoDecoder
from eagle_train.types import (
    IGNORE_INDEX,
    EncodedSample,
    Grid,
    Media,
    MediaKind,
    MediaPlan,
    Sample,
    SampleError,
    tile_shape,
)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Everything that decides how a sample is laid out as tokens.

    Args:
        template: the strings around turns.
        tokenizer: a fast transformers tokenizer.
        images: how images are decoded.
        videos: what decodes videos.
        tiling: how images are cut.
        degrade: how many frames and tiles the media of a sample get.
        tile_size: S, side of a tile in pixels.
        tokens_per_tile: visual tokens of one tile after the projector.
        loss_weight: weights of a sample's tokens, from which of them are supervised.
        positions: the position ids of a sample.

    Raises:
        ValueError: if tiles are blocks of frames, but the template puts labels between frames.
    """

    template: ChatTemplate
    tokenizer: object
    images: ImageReader
    videos: VideoDecoder
    tiling: Tiling
    degrade: Degrade
    tile_size: int
    tokens_per_tile: int
    loss_weight: LossWeight
    positions: Positions = sequential

    def __post_init__(self) -> None:
        if self.tiling.tile_depth > 1 and not self.template.media.whole_video:
            raise ValueError(
                f"a tile holds {self.tiling.tile_depth} frames, so that a video is one run of visual tokens; the chat "
                f"template labels each frame: choose one with media.whole_video=true, such as chat_template=qwen2_vl"
            )

    @cached_property
    def media_costs(self) -> MediaCosts:
        """Counts the tokens of media."""
        return MediaCosts(self.template.media, self.tokenizer, self.tokens_per_tile)

    @cached_property
    def image_id(self) -> int:
        """Token id written at image positions; nothing reads it, positions say where images are."""
        token = self.template.image_token
        if token is None:
            unread = [self.tokenizer.pad_token_id, self.tokenizer.eos_token_id]
            if (index := next((index for index in unread if index is not None), None)) is None:
                raise ValueError("the tokenizer has neither a padding nor an end token; set chat_template.image_token")
            return index
        return self.id_of(token, "image_token")

    @cached_property
    def filler_ids(self) -> dict[MediaKind, int]:
        """Token ids at the positions of media, by kind."""
        token = self.template.video_token
        video = self.image_id if token is None else self.id_of(token, "video_token")
        return {"image": self.image_id, "document": self.image_id, "video": video}

    def id_of(self, token: str, key: str) -> int:
        """Returns the id of a token of the template; raises ValueError, naming the template's key, if there is none."""
        if (index := self.tokenizer.backend_tokenizer.token_to_id(token)) is None:
            raise ValueError(f"the tokenizer has no {key.replace('_', ' ')} {token!r}; set chat_template.{key}")
        return index

    def candidates(self, media: Sequence[Media]) -> list[Candidate]:
        """Returns what a policy must know of the media of a sample.

        Raises:
            MediaError: if `images` refuses one.
        """
        return candidates(media, self.images, self.tiling, self.media_costs)

    def plan_media(self, media: Sequence[Media], budget: int | None = None) -> tuple[tuple[MediaPlan, ...], int]:
        """Returns the frames and tiles of all media of a sample, from their headers, and the tokens that they add.

        Args:
            media: in reading order.
            budget: tokens that text leaves to them; None: no limit. The smallest plans may be longer.

        Raises:
            MediaError: if `images` refuses one.
        """
        asking = self.candidates(media)
        plans = self.degrade.plan(asking, budget)
        return tuple(plans), sum(each.tokens(plan) for each, plan in zip(asking, plans, strict=True))

    def decode(self, key: str, media: Media, plan: MediaPlan, data: Content, out: np.ndarray) -> None:
        """Writes the tiles of one image, video or document into `out` (N, *tile_shape) uint8.

        Raises:
            SampleError: if the bytes cannot be decoded, or are not what the header facts say.
        """
        try:
            if media.kind == "image":
                image = self.images.decode(data)
                if image.size != (planned := self.images.size(media)):
                    detail = f"{media.member}: {image.size} pixels, the index says {planned}; build the index again"
                    raise SampleError(key, "length_mismatch", detail)
                self.tiling.cut(image, plan, out)
                return
            self.tiling.cut_all(pictures(media, plan, data, self.images, self.videos), plan, out)
        except MediaError as error:
            raise SampleError(key, error.reason, f"{media.member or media.kind}: {error}") from error

    def decode_all(
        self, key: str, media: Sequence[Media], plans: Sequence[MediaPlan], data: Sequence[Content], out: np.ndarray
    ) -> None:
        """Writes the tiles of all media of a sample into `out` (N, *tile_shape) uint8, see `decode`."""
        ends = list(accumulate(plan.num_tiles for plan in plans))
        for medium, plan, content, end in zip(media, plans, data, ends, strict=True):
            self.decode(key, medium, plan, content, out[end - plan.num_tiles : end])

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """(3, S, S), or (3, D, S, S) where tiles are blocks of D frames."""
        return tile_shape(self.tile_size, self.tiling.tile_depth)

    def new_tiles(self, plans: Sequence[MediaPlan]) -> np.ndarray:
        """Returns memory for the tiles of media with these plans, (N, *tile_shape) uint8; N may be 0."""
        return np.empty((sum(plan.num_tiles for plan in plans), *self.tile_shape), dtype=np.uint8)

    def row_bytes(self, max_length: int) -> int:
        """Returns the bytes of the largest row of `max_length` tokens."""
        return row_bytes(
            max_length,
            self.tokens_per_tile,
            self.tile_size,
            tile_depth=self.tiling.tile_depth,
            position_rows=self.positions(1, np.empty(0, np.int64), ()).size,
        )

    def grids(self, media: Sequence[Media], plans: Sequence[MediaPlan]) -> tuple[Grid, ...]:
        """Returns the grids of all media of a sample, see `EncodedSample`."""
        strings, found = self.template.media, []
        for medium, plan in zip(media, plans, strict=True):
            found += self.tiling.grids(plan, num_runs(strings, medium, plan.num_frames))
        return tuple(found)

    def encode(
        self, sample: Sample, plans: Sequence[MediaPlan], pixels: np.ndarray, text: TextTokens | None = None
    ) -> EncodedSample:
        """Returns the sample ready to pack.

        Args:
            plans: frames and tiles of each medium of the sample.
            pixels: tiles of all media of the sample, (N, *tile_shape) uint8; not copied.
            text: the tokens of its messages, which are not looked at then; None: they are tokenized.

        Raises:
            SampleError: if nothing is supervised.
        """
        items = self.template.encode(sample.messages, self.tokenizer) if text is None else text.items()
        ids, targets, positions = self.lay_out(items, sample.media, plans)
        supervised = targets[1:]
        if not supervised.any():
            raise SampleError(sample.key, "no_answer", "no token of an answer is supervised")
        if len(positions) != len(pixels) * self.tokens_per_tile:
            raise SampleError(
                sample.key,
                "length_mismatch",
                f"{len(positions)} image positions, {len(pixels)} tiles of {self.tokens_per_tile} tokens",
            )
        labels, loss_weights = np.full(len(ids), IGNORE_INDEX), np.zeros(len(ids), dtype=np.float32)
        labels[:-1][supervised] = ids[1:][supervised]
        loss_weights[:-1] = self.loss_weight(supervised)
        return EncodedSample(
            key=sample.key,
            source=sample.source,
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            loss_weights=torch.from_numpy(loss_weights),
            image_positions=torch.from_numpy(positions),
            pixels=torch.from_numpy(pixels),
            grids=self.grids(sample.media, plans),
        )

    def lay_out(
        self, items: Sequence[TextRun | int], media: Sequence[Media], plans: Sequence[MediaPlan]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids (T,) int64, targets (T,) bool and image positions (M,) int64 of text runs and media between."""
        return interleave(
            items,
            media,
            plans,
            strings=self.template.media,
            tokenizer=self.tokenizer,
            tokens_per_tile=self.tokens_per_tile,
            filler_ids=self.filler_ids,
        )
