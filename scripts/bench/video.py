"""Time and memory of decoding chosen frames, beside PyAV from the start of the file, and torchcodec if installed.

    python scripts/bench/video.py --folder /tmp/videos
    python scripts/bench/video.py --folder /tmp/videos --lengths 3600 --counts 8 128

The files are H.264 with a key frame every 250 frames and two B frames between others, 25 frames per second; they are
made once and stay in `--folder`. For each length and number of frames, evenly spaced, and each decoder with one thread:

time     processor seconds from opening the file to the last frame as RGB, the median of `--rounds` taken in turn
ratios   medians too, each of the quotients within a round: what else runs on the machine slows all decoders of a round
memory   peak of the process over what it held before, MiB; frames are let go as soon as the decoder allows it

naive decodes all frames from the start and converts the chosen ones. torchcodec gives all frames at once; its exact
mode reads every packet first, its approximate mode takes the rate to be constant. All must give the same pixels. All
run as workers do, which keep memory that is freed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from machine import circumstances, forget_peak, memory_mib
from PIL import Image

from eagle_train.data.frames import shown_seconds
from eagle_train.data.heap import keep_freed_memory
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.data.videos import probe_video
from eagle_train.types import Media

FPS = 25
SIZES = {10: (1280, 720), 60: (640, 360), 600: (320, 240), 3600: (160, 120)}
"""Width and height, pixels, of the file of so many seconds: small where it is long, so that it is made in time."""

Decode = Callable[[Path, Sequence[float]], Iterator[np.ndarray | Image.Image]]
"""Takes a file and times in seconds; yields frames (H, W, 3) uint8, or pictures."""


def make_file(path: Path, seconds: int) -> None:
    """Writes a video of blocks that move, unless it is there."""
    if path.exists():
        return
    width, height = SIZES[seconds]
    aside = path.with_suffix(".partial.mp4")
    blocks = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1), np.uint8)
    blocks = blocks.repeat(8, 0).repeat(8, 1)  # twice as wide and high as the picture
    with av.open(aside, "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "bf": "2", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        planes = np.full((height * 3 // 2, width), 128, np.uint8)
        for i in range(seconds * FPS):
            top, left = i % height, 2 * i % width
            planes[:height] = blocks[top : top + height, left : left + width]
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    aside.rename(path)


def ours(path: Path, seconds: Sequence[float]) -> Iterator[Image.Image]:
    """Yields the frames as training decodes them."""
    with path.open("rb") as file:
        yield from PyAvVideo().decode(file, seconds)


def naive(path: Path, seconds: Sequence[float]) -> Iterator[np.ndarray]:
    """Yields the frames out of all that are decoded from the start."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        left = list(seconds)
        shown = None
        for frame in container.decode(stream):
            while left and shown is not None and frame.time > left[0]:
                yield shown.to_ndarray(format="rgb24")
                left.pop(0)
            shown = frame
        for _ in left:
            yield shown.to_ndarray(format="rgb24")


def torchcodec_exact(path: Path, seconds: Sequence[float]) -> Iterator[np.ndarray]:
    """Yields the frames that torchcodec gives after it has read all packets."""
    return _torchcodec(path, seconds, "exact")


def torchcodec_approximate(path: Path, seconds: Sequence[float]) -> Iterator[np.ndarray]:
    """Yields the frames that torchcodec gives from headers alone."""
    return _torchcodec(path, seconds, "approximate")


def _torchcodec(path: Path, seconds: Sequence[float], mode: str) -> Iterator[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode, stream_index=0)
    yield from decoder.get_frames_played_at(list(seconds)).data.numpy()


def measure(decode: Decode, path: Path, seconds: Sequence[float]) -> tuple[float, float, str]:
    """Returns the processor seconds, the MiB, and a hash of the frames, of one decoding each.

    The second one is timed, as a worker decodes one video after another: the first gets its memory from the system.
    """
    forget_peak()
    held = memory_mib("VmRSS")
    for _ in decode(path, seconds):
        pass
    peak = memory_mib("VmHWM") - held
    start = time.process_time()
    for _ in decode(path, seconds):
        pass
    spent = time.process_time() - start
    digest = hashlib.sha256()
    for frame in decode(path, seconds):
        digest.update(np.asarray(frame))
    return spent, peak, digest.hexdigest()


def compare(
    decoders: Sequence[Decode], pools: dict[str, ProcessPoolExecutor], path: Path, count: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Returns time and memory of each decoder by name, and how many times as long as ours it takes."""
    with path.open("rb") as file:
        media = Media(kind="video", **probe_video(file)._asdict())
    seconds = shown_seconds(media, count)
    found: dict[str, list[tuple[float, float, str]]] = {decode.__name__: [] for decode in decoders}
    for _ in range(rounds):
        for decode in decoders:
            found[decode.__name__].append(pools[decode.__name__].submit(measure, decode, path, seconds).result())
    digests = {digest for runs in found.values() for _, _, digest in runs}
    if len(digests) != 1:
        raise ValueError(f"{path}, {count} frames: the decoders disagree")
    return {
        name: {
            "seconds": statistics.median(spent for spent, _, _ in runs),
            "mib": min(peak for _, peak, _ in runs),
            "over_ours": statistics.median(run[0] / our[0] for run, our in zip(runs, found["ours"], strict=True)),
        }
        for name, runs in found.items()
    }


def main() -> None:
    """Makes the files, measures, and prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    where = circumstances() | {"ffmpeg": str(av.library_versions["libavcodec"]), "av": av.__version__}
    print(*(f"{name}: {value}" for name, value in where.items()), sep="\n")
    decoders: list[Decode] = [ours, naive]
    if importlib.util.find_spec("torchcodec"):
        decoders += [torchcodec_exact, torchcodec_approximate]
    spawned = partial(ProcessPoolExecutor, 1, get_context("spawn"), keep_freed_memory)
    pools = {decode.__name__: spawned() for decode in decoders}
    rows = []
    for length in args.lengths:
        path = args.folder / f"{length}s.mp4"
        make_file(path, length)
        for count in args.counts:
            found = compare(decoders, pools, path, count, args.rounds)
            naive_ratio = found["naive"]["over_ours"]
            best_ratio = min(result["over_ours"] for name, result in found.items() if name != "ours")
            rows.append({"length": length, "frames": count, "vs_naive": naive_ratio, "vs_best": best_ratio, **found})
            shown = "  ".join(f"{name} {r['seconds']:.3f} s {r['mib']:.0f} MiB" for name, r in found.items())
            ratios = f"{naive_ratio:5.1f}x naive {best_ratio:5.2f}x best other"
            print(f"{length:5d} s {count:4d} frames {ratios}  {shown}", flush=True)
    for pool in pools.values():
        pool.shutdown()
    print(json.dumps(where | {"rows": rows}))


if __name__ == "__main__":
    main()
