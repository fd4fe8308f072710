"""Small shards and the loader of their rows, for tests of faults."""

import io

import numpy as np
from PIL import Image

from eagle_train.data.catalog import Source
from eagle_train.data.degrade import EachByItself
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader
from eagle_train.data.loader import RowDataset, RowTask
from eagle_train.data.loss_weights import per_token
from eagle_train.data.replay import digest
from eagle_train.data.shards import write_shards
from eagle_train.data.step_loader import StepLoader
from eagle_train.data.stream import steps
from eagle_train.data.tiling import PadToSquare
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.assemble import load_tokenizer
from eagle_train.train.config import build, load_choice
from tests.catalogs import plan_config, read_catalog


def tiny_encoder(data):
    """Returns an encoder of tiles of 4 tokens, with the tokenizer of a small data set."""
    return Encoder(
        template=build(load_choice("chat_template", "toy")),
        tokenizer=load_tokenizer(str(data / "tokenizer")),
        images=ImageReader(),
        videos=PyAvVideo(),
        tiling=PadToSquare(),
        degrade=EachByItself(frames=FrameRate()),
        tile_size=16,
        tokens_per_tile=4,
        loss_weight=per_token,
    )


def open_data(folder, samples, encoder):
    shards = write_shards(samples, folder / "s", samples_per_shard=5)
    return read_catalog([Source(name="s", shards=shards)], encoder, 64)


def load(dataset, workers=0):
    """Returns the loader of two epochs in rows of 64 tokens, two a step."""
    config = plan_config(dataset.catalog, max_length=64, rows_per_step=2, num_epochs=2)
    return StepLoader(
        dataset=dataset,
        steps=steps(dataset.catalog, config),
        rank=0,
        world_size=1,
        micro_batches=2,
        num_workers=workers,
        prefetch=2,
        row_bytes=1 << 16,
    )


def digests(loaded):
    return [digest(row) for _, rows in loaded for row in rows]


def errors(loaded):
    return [error for _, rows in loaded for row in rows for _, error in row.errors]


def row_of(catalog, dataset=None, samples=range(20)):
    """One row of the named samples."""
    return (dataset or RowDataset(catalog, None))[RowTask(3, np.array(list(samples)))]


def jpeg(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()
