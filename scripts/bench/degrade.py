"""Samples per second that Automatic Degrade Sampling plans from header facts, on one core.

    python scripts/bench/degrade.py --tokenizer FOLDER [--template eagle2_5]

The tokenizer gets the special tokens of the template. Sizes and durations are random, planning is the whole of it:
asking the tiling, counting every label, choosing, and the tokens of the choice. The table of numbers is warm, as
after the first samples of a data set. Processor time counts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable

from machine import circumstances

from eagle_train.data.degrade import AutomaticDegradeSampling
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader
from eagle_train.data.loss_weights import per_token
from eagle_train.data.tile_grids import ImageAreaPreservation
from eagle_train.data.tokenizer.load import default_cache, load_tokenizer
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.config import build, load_choice
from eagle_train.types import Media

RATES = (23.976, 25.0, 29.97, 30.0)


def image(rng: random.Random) -> Media:
    """Returns an image of 200 to 3000 pixels a side."""
    return Media(kind="image", width=rng.randrange(200, 3000), height=rng.randrange(200, 3000))


def video(rng: random.Random) -> Media:
    """Returns a video of 260 s to an hour: it asks for 512 frames."""
    seconds = rng.uniform(260, 3600)
    return Media(kind="video", duration=seconds, num_frames=int(seconds * rng.choice(RATES)))


CASES: dict[str, tuple[Callable[[random.Random], list[Media]], int]] = {
    "an image, room for 12 tiles": (lambda rng: [image(rng)], 16_000),
    "an image, room for a few": (lambda rng: [image(rng)], 1_500),
    "4 images, room for some": (lambda rng: [image(rng) for _ in range(4)], 6_500),
    "512 frames, room for all": (lambda rng: [video(rng)], 200_000),
    "512 frames asked, 128K": (lambda rng: [video(rng)], 131_072),
    "512 frames asked, 32K": (lambda rng: [video(rng)], 32_768),
    "3 videos of 512, 128K": (lambda rng: [video(rng) for _ in range(3)], 131_072),
}


def make_encoder(tokenizer_path: str, template_name: str) -> Encoder:
    """Returns an encoder of Eagle 2.5's sizes."""
    tokenizer = load_tokenizer(tokenizer_path, default_cache())
    template = build(load_choice("chat_template", template_name))
    tokenizer.add_special_tokens({"additional_special_tokens": template.missing_tokens(tokenizer)})
    return Encoder(
        template=template,
        tokenizer=tokenizer,
        images=ImageReader(),
        videos=PyAvVideo(),
        tiling=ImageAreaPreservation(tile_size=448),
        degrade=AutomaticDegradeSampling(frames=FrameRate(fps=2.0, min_frames=8, max_frames=512)),
        tile_size=448,
        tokens_per_tile=256,
        loss_weight=per_token,
    )


def samples_per_second(
    encoder: Encoder, make: Callable[[random.Random], list[Media]], budget: int, count: int
) -> float:
    """Returns how many samples are planned in a second of processor time, the best of three rounds."""
    rng = random.Random(0)
    samples = [make(rng) for _ in range(count)]
    times = []
    for _ in range(3):
        start = time.process_time()
        for media in samples:
            encoder.plan_media(media, budget)
        times.append(time.process_time() - start)
    return count / min(times)


def main() -> None:
    """Prints a line per case, and all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--template", default="eagle2_5")
    parser.add_argument("--samples", type=int, default=1000, help="of each case")
    options = parser.parse_args()
    encoder = make_encoder(options.tokenizer, options.template)
    found = {}
    for name, (make, budget) in CASES.items():
        found[name] = round(samples_per_second(encoder, make, budget, options.samples))
        print(f"{name:30} {found[name]:>8,} samples/s", flush=True)
    print(json.dumps({**circumstances(), "samples_per_second": found}))


if __name__ == "__main__":
    main()
