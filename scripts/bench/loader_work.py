"""The work that every loader of the benchmark does to a sample, from its bytes to tensors, by the same functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from eagle_train.data.chat import ChatTemplate
from eagle_train.data.collate import pack
from eagle_train.data.degrade import EachByItself
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader, probe_image
from eagle_train.data.loss_weights import per_token
from eagle_train.data.tiling import PadToSquare
from eagle_train.data.tokenizer import load
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.config import build, load_config
from eagle_train.types import EncodedSample, Media, MediaPlan, Message, Sample

IMAGE = Media(kind="image", member="jpg", width=1, height=1)
ONE_TILE = MediaPlan()


def media_of(image: bytes) -> Media:
    """Returns the header facts of an image; ours has them in its index."""
    width, height, orientation = probe_image(image)
    return Media(kind="image", member="jpg", width=width, height=height, orientation=orientation)


@dataclass(frozen=True, kw_only=True)
class BlankEncoder(Encoder):
    """An encoder that decodes nothing: every image is one black tile. What is left is the loader's own cost."""

    def decode(self, key: str, media: Media, plan: MediaPlan, data: bytes, out: np.ndarray) -> None:
        """Writes zeros into `out` (1, 3, S, S) uint8."""
        del key, media, plan, data
        out.fill(0)


def make_encoder(tokenizer: str | Path, *, tile_size: int, tokens_per_tile: int, template: str, blank: bool) -> Encoder:
    """Returns the encoder that all loaders use.

    Args:
        template: a file of configs/chat_template.
        blank: no image is decoded.
    """
    node = load_config(["+experiment=toy", f"chat_template={template}"])["chat_template"]
    chat: ChatTemplate = build(node)
    return (BlankEncoder if blank else Encoder)(
        template=chat,
        tokenizer=load.load_tokenizer(str(tokenizer), load.default_cache()),
        images=ImageReader(),
        videos=PyAvVideo(),
        tiling=PadToSquare(),
        degrade=EachByItself(frames=FrameRate()),
        tile_size=tile_size,
        tokens_per_tile=tokens_per_tile,
        loss_weight=per_token,
    )


def parse_sample(key: str, data: bytes) -> Sample:
    """Returns the conversation of a `json` member, trusted: a user of a peer would check no more."""
    messages = []
    for turn in json.loads(data)["messages"]:
        parts = (part["text"] if part["type"] == "text" else part["index"] for part in turn["content"])
        messages.append(Message(role=turn["role"], content=tuple(parts)))
    return Sample(key=key, source="bench", messages=tuple(messages), media=(IMAGE,))


@dataclass(frozen=True)
class Work:
    """The work on a sample and on a batch of samples, to be called in the workers."""

    encoder: Encoder

    def bare(self, sample: Sample, image: bytes, tile: np.ndarray) -> None:
        """Decodes, resizes and tokenizes, nothing else.

        Args:
            tile: (1, 3, S, S) uint8, memory for the result.
        """
        self.encoder.decode(sample.key, media_of(image), ONE_TILE, image, tile)
        self.encoder.template.encode(sample.messages, self.encoder.tokenizer)

    def encode(self, key: str, image: bytes, record: bytes) -> EncodedSample:
        """Returns a sample of its two members' bytes."""
        sample = parse_sample(key, record)
        tile = self.encoder.new_tiles([ONE_TILE])
        self.encoder.decode(key, media_of(image), ONE_TILE, image, tile)
        return self.encoder.encode(sample, [ONE_TILE], tile)

    def join(self, samples: Sequence[EncodedSample]) -> dict[str, Any]:
        """Returns samples laid end to end, as ours are: few large tensors, so workers hand over little.

        The keys come first, by which mosaicml-streaming counts samples.
        """
        row = pack(samples, [], filler_id=self.encoder.image_id, tile_size=self.encoder.tile_size)
        return {"keys": row.keys} | {f.name: getattr(row, f.name) for f in fields(row) if f.name != "keys"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a loader is asked for."""

    root: Path
    """Of the data, see `loader_data.Paths`."""
    make_encoder: Callable[[], Encoder]
    """Of the data's conversations and photos."""
    workers: int
    prefetch: int
    """Batches that each worker prepares ahead."""
    batch: int
    """Samples of a peer's batch."""
    max_length: int
    """Tokens of our rows."""
    shuffle: int
    """Samples in a peer's shuffle buffer; ours shuffles all, mosaicml-streaming blocks of its own size."""
    num_samples: int
    """More than will be taken."""
    seed: int
