"""Time of every attention backend that runs here on one packed row, forward and backward, beside the first one.

    python scripts/bench/attention.py --tokens 2048 --heads 8 --key-heads 2
    python scripts/bench/attention.py --device cuda --tokens 65536 --heads 32 --key-heads 8 --head-dim 128

The row's samples have lengths drawn log-normally around `--median`, as those of instruction data. Backends take
turns; medians are compared. Rates count 2 products of matrices forward and 5 backward, of half squares, since
attention is causal, of each sample by itself. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from encoders import circumstances

from eagle_train.model.attention.backend import Segments
from eagle_train.model.attention.first_available import FirstAvailable
from eagle_train.train.config import build, load_choice, options


def sample_lengths(total: int, median: int, seed: int = 0) -> list[int]:
    """Returns lengths that sum to `total`, log-normal with a deviation of 1 around `median`."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        drawn = int(median * torch.randn((), generator=generator).clamp(-2.0, 2.0).exp())
        lengths.append(max(1, min(drawn, total - sum(lengths))))
    return lengths


def backends(query: torch.Tensor) -> dict[str, Callable]:
    """Returns every backend of the configs that can run on `query`, by name."""
    known = {}
    for name in options("attention"):
        backend = build(load_choice("attention", name))
        candidates = backend.candidates if isinstance(backend, FirstAvailable) else [backend]
        known |= {str(candidate): candidate for candidate in candidates}
    for name, candidate in list(known.items()):
        if (reason := candidate.refusal(query)) is not None:
            print(f"{name}: left out, {reason}")
            del known[name]
    return known


def timed(backend: Callable, tensors: list[torch.Tensor], segments: Segments) -> tuple[float, float]:
    """Returns seconds forward and backward of one call."""
    now = clock(tensors[0].device)
    start = now()
    output = backend(*tensors, segments, scale=tensors[0].shape[-1] ** -0.5, causal=True)
    middle = now()
    torch.autograd.grad(output.float().square().mean(), tensors)
    return middle - start, now() - middle


def clock(device: torch.device) -> Callable[[], float]:
    """Returns what gives the time in seconds when the device is done; processor time on a CPU."""
    if device.type == "cpu":
        return time.process_time

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def main() -> None:
    """Compares the backends and prints a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--median", type=int, default=256, help="of the samples' lengths")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=5)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    lengths = sample_lengths(args.tokens, args.median)
    segments = Segments.of(lengths, args.device)
    shapes = [(args.tokens, heads, args.head_dim) for heads in (args.heads, args.key_heads, args.key_heads)]
    tensors = [torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True) for shape in shapes]
    facts = circumstances(args.device) | {"samples": f"{len(lengths)} of {min(lengths)} to {max(lengths)} tokens"}
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    found = backends(tensors[0])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for turn in range(args.iterations + 1):
        for name in reversed(found) if turn % 2 else found:
            times[name].append(timed(found[name], tensors, segments))
    product = args.heads * args.head_dim * sum(length**2 for length in lengths)  # 2 operations, half of the square
    results = {}
    for name, rounds in times.items():
        forward, backward = (statistics.median(column) for column in zip(*rounds[1:], strict=True))  # 1: warm-up
        rates = {"forward_tflops": 2 * product / forward / 1e12, "tflops": 7 * product / (forward + backward) / 1e12}
        results[name] = {"forward_seconds": forward, "backward_seconds": backward} | rates
        print(
            f"{name:<22} {forward * 1e3:9.2f} ms + {backward * 1e3:9.2f} ms  {rates['tflops']:8.3f} TFLOP/s", flush=True
        )
    print(json.dumps(facts | {"results": results}))


if __name__ == "__main__":
    main()
