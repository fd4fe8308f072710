"""A sample becomes token ids, shifted labels, loss weights and pixels; its length is known from headers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from eagle_train.data.chat import ChatTemplate, TextRun, backend_of, encode_run
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader
from eagle_train.data.media import MediaError
from eagle_train.data.tiling import Tiling
from eagle_train.data.videos import decode_frames
from eagle_train.types import IGNORE_INDEX, EncodedSample, Media, MediaPlan, Sample, SampleError

VISUAL = -1
"""Stands for a visual token while a sample is laid out; no token id."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Everything that decides how a sample is laid out as tokens.

    Args:
        template: the strings around turns.
        tokenizer: a fast transformers tokenizer.
        images: how images are decoded.
        tiling: how images are cut.
        frames: how many frames a video gives.
        tile_size: S, side of a tile in pixels.
        tokens_per_tile: visual tokens of one tile after the projector.
        loss_weight: weight of a supervised token, from their number in the sample (see `loss_weights`).
    """

    template: ChatTemplate
    tokenizer: object
    images: ImageReader
    tiling: Tiling
    frames: FrameRate
    tile_size: int
    tokens_per_tile: int
    loss_weight: Callable[[int], float]

    @cached_property
    def between_frames(self) -> np.ndarray:
        """(n,) int64: token ids between two frames of a video, the media suffix and the next prefix."""
        pieces = [(self.template.media_suffix, False), (self.template.media_prefix, False)]
        return encode_run(pieces, backend_of(self.tokenizer)).ids

    @cached_property
    def image_id(self) -> int:
        """Token id written at image positions; nothing reads it, positions say where images are."""
        token = self.template.image_token
        if token is None:
            unread = [self.tokenizer.pad_token_id, self.tokenizer.eos_token_id]
            if (index := next((index for index in unread if index is not None), None)) is None:
                raise ValueError("the tokenizer has neither a padding nor an end token; set chat_template.image_token")
            return index
        if (index := self.tokenizer.convert_tokens_to_ids(token)) is None:
            raise ValueError(f"the tokenizer has no image token {token!r}; set chat_template.image_token")
        return index

    def plan_media(self, media: Media) -> MediaPlan:
        """Returns the frames and tiles of one image or video, from its header.

        Raises:
            MediaError: if `images` refuses it.
        """
        if media.kind == "image":
            return self.tiling.plan(*self.images.size(media))
        return MediaPlan(num_frames=self.frames.num_frames(media.duration, media.num_frames))

    def media_length(self, plan: MediaPlan) -> int:
        """Returns the tokens one image or video adds to the text of its sample."""
        return plan.num_tiles * self.tokens_per_tile + (plan.num_frames - 1) * len(self.between_frames)

    def decode(self, key: str, media: Media, plan: MediaPlan, data: bytes, out: np.ndarray) -> None:
        """Writes the tiles of one image or video into `out` (N, 3, S, S) uint8.

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
            frames = decode_frames(data, plan.num_frames)
        except MediaError as error:
            raise SampleError(key, error.reason, f"{media.member}: {error}") from error
        one = MediaPlan()
        for frame, tile in zip(frames, out, strict=True):
            self.tiling.cut(frame, one, tile[None])

    def decode_all(
        self, key: str, media: Sequence[Media], plans: Sequence[MediaPlan], data: Sequence[bytes], out: np.ndarray
    ) -> None:
        """Writes the tiles of all media of a sample into `out` (N, 3, S, S) uint8, see `decode`."""
        ends = list(accumulate(plan.num_tiles for plan in plans))
        for medium, plan, content, end in zip(media, plans, data, ends, strict=True):
            self.decode(key, medium, plan, content, out[end - plan.num_tiles : end])

    def new_tiles(self, plans: Sequence[MediaPlan]) -> np.ndarray:
        """Returns memory for the tiles of media with these plans, (N, 3, S, S) uint8; N may be 0."""
        num_tiles = sum(plan.num_tiles for plan in plans)
        return np.empty((num_tiles, 3, self.tile_size, self.tile_size), dtype=np.uint8)

    def encode(self, sample: Sample, plans: Sequence[MediaPlan], pixels: np.ndarray) -> EncodedSample:
        """Returns the sample ready to pack.

        Args:
            plans: frames and tiles of each medium of the sample.
            pixels: tiles of all media of the sample, (N, 3, S, S) uint8; not copied.

        Raises:
            SampleError: if nothing is supervised.
        """
        ids, targets, positions = self.lay_out(self.template.encode(sample.messages, self.tokenizer), plans)
        num_targets = int(np.count_nonzero(targets[1:]))
        if num_targets == 0:
            raise SampleError(sample.key, "no_answer", "no token of an answer is supervised")
        if len(positions) != len(pixels) * self.tokens_per_tile:
            raise SampleError(
                sample.key,
                "length_mismatch",
                f"{len(positions)} image positions, {len(pixels)} tiles of {self.tokens_per_tile} tokens",
            )
        labels, loss_weights = np.full(len(ids), IGNORE_INDEX), np.zeros(len(ids), dtype=np.float32)
        labels[:-1][targets[1:]] = ids[1:][targets[1:]]
        loss_weights[:-1][targets[1:]] = self.loss_weight(num_targets)
        return EncodedSample(
            key=sample.key,
            source=sample.source,
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            loss_weights=torch.from_numpy(loss_weights),
            image_positions=torch.from_numpy(positions),
            pixels=torch.from_numpy(pixels),
        )

    def lay_out(
        self, items: Sequence[TextRun | int], plans: Sequence[MediaPlan]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids (T,) int64, targets (T,) bool and image positions (M,) int64 of text runs and media between.

        A video is its frames one after another, each between the template's media prefix and suffix; the
        first prefix and the last suffix belong to the text around.
        """
        ids: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        for item in items:
            if isinstance(item, TextRun):
                ids.append(item.ids)
                targets.append(item.is_target)
                continue
            plan = plans[item]
            frame = np.full(plan.num_tiles // plan.num_frames * self.tokens_per_tile, VISUAL)
            medium = np.concatenate([frame, *[self.between_frames, frame] * (plan.num_frames - 1)])
            ids.append(medium)
            targets.append(np.zeros(len(medium), dtype=bool))
        input_ids = np.concatenate(ids)
        (positions,) = (input_ids == VISUAL).nonzero()
        input_ids[positions] = self.image_id
        return input_ids, np.concatenate(targets), positions
