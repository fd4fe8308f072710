"""Lengths of samples, drawn like those of published training mixes; for benchmarks that need no pixels.

Known and taken as published: how many samples each source or category has, the tokens of a tile or frame, the tiling
rule. Not published, so chosen here: the sizes of the images and the lengths of the texts. A text has a lognormal
number of tokens (median, sigma of the logarithm), template included, at most 32,768; image sizes are those of the
kind of source: photos like COCO's, pages of A4 and letter paper, charts, drawings, pictures of the web.

`eagle1_sft`: the 1.8M samples of data_recipes/eagle-sft-1.8m.yaml in the counts of its cards. An image is one tile
    and 1024 tokens, as in Eagle-X.
`eagle1_tiled`: the same samples with Eagle 2's tiling: 256 tokens for each of up to 12 tiles and a thumbnail.
`eagle2_sft`: Eagle 2's stage 2, 4.6M samples in the shares of its table 2, tiled.
`eagle25_long`: the long half of Eagle 2.5's stages 2 to 4, 4.6M samples: 85 % videos (lognormal seconds, median 60,
    sigma 1.1, at most an hour) at 2 frames a second, at least 8 frames, 256 tokens of each frame and 14 of its
    label; 10 % documents of 2 to 60 pages, tiled, with fewer tiles a page while they do not fit; 5 % long texts
    (median 12,000).
`eagle25`: as many samples of eagle2_sft as of eagle25_long: Eagle 2.5's stages 2 to 4.

Samples are fitted to the row as Eagle does: an image gets at most 12, 10, 8, ... 1 tiles until its sample fits, a
video fewer frames; what still does not fit is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TILE = 448
TILE_TOKENS = 256
FRAME_LABEL = 14
"""Tokens of a frame's label, `Frame 12 sample at 5.50s: <img></img>`."""
MAX_TILES = (12, 10, 8, 6, 4, 2, 1)
ANSWERS = 0.6
"""Share of a text that has labels; not published, chosen here."""
SHARD = 1000
"""Samples of a shard."""

# Sources of the 1.8M mix: samples (thousands), kind of image, median and sigma of the text.
EAGLE1 = (
    (15, "chart", 90, 0.4),  # ai2d
    (28, "chart", 60, 0.3),  # chartqa
    (39, "page", 60, 0.4),  # docvqa
    (25, "drawing", 60, 0.2),  # dvqa
    (120, "drawing", 170, 0.5),  # geo170k
    (11, "web", 300, 0.4),  # laion_gpt4v
    (665, "photo", 230, 0.6),  # llava_665k
    (20, "web", 200, 0.5),  # llavar
    (150, "photo", 90, 0.4),  # lrv_instruct
    (220, "photo", 420, 0.4),  # lvis_instruct4v
    (300, None, 380, 0.9),  # openhermes
    (100, "photo", 240, 0.3),  # sharegpt4v
    (50, "page", 250, 0.5),  # synthdog_en
    (70, "photo", 110, 0.4),  # visual7w
)
# Categories of Eagle 2's stage 2: thousands of 4.6M samples.
EAGLE2 = (
    (653, "photo", 200, 0.8),  # general
    (193, "web", 220, 0.6),  # captions and knowledge
    (621, "drawing", 150, 0.8),  # science
    (432, "chart", 120, 0.7),  # charts and tables
    (396, "drawing", 220, 0.6),  # mathematics
    (474, "page", 90, 0.7),  # questions about texts
    (46, "photo", 100, 0.5),  # grounding and counting
    (1228, None, 400, 0.9),  # text
    (561, "line", 80, 1.0),  # reading texts
)


@dataclass(frozen=True)
class Lengths:
    """Samples in shards: tokens, tiles and targets (n,) int64, shards and sources (n,) int64 ascending from 0."""

    tokens: np.ndarray
    tiles: np.ndarray
    targets: np.ndarray
    shards: np.ndarray
    sources: np.ndarray


def image_sizes(kind: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns widths and heights in pixels of `count` images of a kind of source."""
    if kind == "photo":  # COCO: the longer side has 640 pixels, mostly 4:3 or 3:2
        long = np.full(count, 640)
        short = np.where(
            rng.random(count) < 0.75, rng.choice([480, 427, 426, 425], count), rng.integers(360, 641, count)
        )
        upright = rng.random(count) < 0.25
        return np.where(upright, short, long), np.where(upright, long, short)
    if kind == "page":  # A4 or letter at 100 to 250 dots per inch
        inches = np.array([[8.27, 11.69], [8.5, 11.0]])[rng.integers(0, 2, count)]
        dots = rng.integers(100, 251, count)
        return (inches[:, 0] * dots).astype(int), (inches[:, 1] * dots).astype(int)
    low, high, wide = {
        "chart": (500, 1200, 1.4),
        "drawing": (200, 600, 1.2),
        "web": (300, 2000, 1.2),
        "line": (100, 1500, 3.0),
    }[kind]
    width = np.exp(rng.uniform(np.log(low), np.log(high), count))
    aspect = np.exp(rng.normal(np.log(wide), 0.3, count))
    return width.astype(int), np.maximum(width / aspect, 28).astype(int)


def num_tiles(width: np.ndarray, height: np.ndarray, max_tiles: int) -> np.ndarray:
    """Returns the tiles, thumbnail included, of images of these sizes.

    Source: Eagle 2's rule: the first grid with the largest min(area / image, 0.6) * similarity of aspect ratios.
    """
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    aspect = width / height
    best, tiles = np.full(len(width), -1.0), np.zeros(len(width), dtype=np.int64)
    for cols, rows in grids:
        ratio = cols / rows / aspect
        score = np.minimum(cols * rows * TILE**2 / (width * height), 0.6) * np.minimum(ratio, 1 / ratio)
        better = score > best
        best[better], tiles[better] = score[better], cols * rows
    return tiles + (tiles > 1)


def texts(median: float, sigma: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns lengths of texts in tokens."""
    return np.clip(np.exp(rng.normal(np.log(median), sigma, count)), 20, 32_768).astype(np.int64)


Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Tokens, tiles and tokens of text of a source."""


def images(sources: tuple, capacity: int, rng: np.random.Generator, share: float, tiled: bool) -> list[Part]:
    """Returns a `share` of each source."""
    parts = []
    for thousands, kind, median, sigma in sources:
        count = round(thousands * 1000 * share)
        text = texts(median, sigma, count, rng)
        if kind is None:
            visual = np.zeros(count, dtype=np.int64)
        elif not tiled:
            visual = np.ones(count, dtype=np.int64)
        else:
            size = image_sizes(kind, count, rng)
            visual = num_tiles(*size, MAX_TILES[0])
            for limit in MAX_TILES[1:]:
                over = text + visual * TILE_TOKENS > capacity
                if over.any():
                    visual[over] = num_tiles(size[0][over], size[1][over], limit)
        parts.append((text + visual * (TILE_TOKENS if tiled else 1024), visual, text))
    return parts


def long_samples(capacity: int, rng: np.random.Generator, share: float) -> list[Part]:
    """Returns videos, documents and long texts."""
    counts = [round(4_600_000 * share * part) for part in (0.85, 0.10, 0.05)]
    seconds = np.minimum(np.exp(rng.normal(np.log(60), 1.1, counts[0])), 3600)
    text = texts(250, 0.8, counts[0], rng)
    per_frame = TILE_TOKENS + FRAME_LABEL
    frames = np.clip((2 * seconds).astype(np.int64), 8, np.maximum((capacity - text) // per_frame, 8))
    parts = [(text + frames * per_frame, frames, text)]
    text = texts(300, 0.8, counts[1], rng)
    pages = np.clip(np.exp(rng.normal(np.log(8), 0.9, counts[1])), 2, 60).astype(np.int64)
    each = np.full(counts[1], 13)
    for limit in (11, 9, 7, 5, 3, 1):
        each = np.where(text + pages * each * TILE_TOKENS > capacity, limit, each)
    parts.append((text + pages * each * TILE_TOKENS, pages * each, text))
    text = texts(12_000, 0.7, counts[2], rng)
    parts.append((text, np.zeros(counts[2], dtype=np.int64), text))
    return parts


MIXES = ("eagle1_sft", "eagle1_tiled", "eagle2_sft", "eagle25", "eagle25_long")


def lengths_of(mix: str, capacity: int, share: float = 1.0, seed: int = 0) -> Lengths:
    """Returns a `share` of the samples of a mix, fitted to rows of `capacity` tokens."""
    rng = np.random.default_rng(seed)
    parts = {
        "eagle1_sft": lambda: images(EAGLE1, capacity, rng, share, tiled=False),
        "eagle1_tiled": lambda: images(EAGLE1, capacity, rng, share, tiled=True),
        "eagle2_sft": lambda: images(EAGLE2, capacity, rng, share, tiled=True),
        "eagle25": lambda: [
            *images(EAGLE2, capacity, rng, share / 2, tiled=True),
            *long_samples(capacity, rng, share / 2),
        ],
        "eagle25_long": lambda: long_samples(capacity, rng, share),
    }[mix]()
    tokens, tiles, text = (np.concatenate(column) for column in zip(*parts, strict=True))
    counts = [len(part) for part, *_ in parts]
    sources = np.repeat(np.arange(len(parts)), counts)
    # Every source begins a shard of its own.
    firsts = np.cumsum([0, *(-(-count // SHARD) for count in counts)])
    shards = np.concatenate([np.arange(count) // SHARD + first for count, first in zip(counts, firsts, strict=False)])
    fits = tokens <= capacity
    targets = (ANSWERS * text).astype(np.int64)
    return Lengths(tokens[fits], tiles[fits], targets[fits], shards[fits], sources[fits])
