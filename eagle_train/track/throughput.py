"""Speed, share of the peak, data wait, packing fill and memory over the steps since the last log."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 2**30


class Throughput:
    """Accumulates what steps did; `flush` turns it into rates and begins anew.

    Counts are those of all ranks together where the caller sums them; seconds and memory are this rank's.

    Args:
        num_ranks: that share the counted FLOPs.
        peak_tflops: of one rank's device, 1e12 FLOP/s; None: not known, there is no MFU then.
    """

    def __init__(self, *, num_ranks: int = 1, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"peak_tflops is {peak_tflops}; give one above 0, or null where it is not known")
        self._num_ranks = num_ranks
        self._peak_tflops = peak_tflops
        self._reset()

    def _reset(self) -> None:
        self._tokens = self._supervised = self._images = self._capacity = self._steps = 0
        self._wait_seconds = self._seconds = 0.0
        self._useful = self._executed = 0.0

    def update(
        self,
        *,
        tokens: int = 0,
        supervised: int = 0,
        images: int = 0,
        capacity: int = 0,
        useful_flops: float = 0.0,
        executed_flops: float = 0.0,
        data_wait_seconds: float = 0.0,
        step_seconds: float | None = None,
    ) -> None:
        """Adds counts; the call that gives `step_seconds` ends a step.

        Args:
            tokens: tokens of samples.
            supervised: tokens with a loss.
            images: image tiles.
            capacity: tokens that the rows have room for.
            useful_flops, executed_flops: as MFU and as HFU count them, of all ranks.
            data_wait_seconds: how long the step waited for its rows, part of `step_seconds`.
            step_seconds: the whole step, from waiting for its rows to the end of the update.
        """
        self._tokens += tokens
        self._supervised += supervised
        self._images += images
        self._capacity += capacity
        self._useful += useful_flops
        self._executed += executed_flops
        self._wait_seconds += data_wait_seconds
        if step_seconds is not None:
            self._seconds += step_seconds
            self._steps += 1

    def flush(self) -> dict[str, float]:
        """Returns the metrics since the last flush, and begins anew.

        Returns:
            `time/{tokens,supervised_tokens,images}_per_second`, `time/step_seconds` (mean), `time/data_wait_share`
            (0 to 1), `data/fill` (0 to 1; absent without a capacity) and `memory/peak_*_gib`. Where FLOPs are counted,
            `perf/tflops_per_rank` (useful ones, 1e12 per second), and where the peak is known, `perf/mfu` and
            `perf/hfu` (0 to 1).

        Raises:
            ValueError: if no step ended since the last flush.
        """
        if self._steps == 0 or self._seconds <= 0:
            raise ValueError(
                f"{self._steps} steps in {self._seconds} s since the last flush; call update(step_seconds=...) first"
            )
        metrics = {
            "time/tokens_per_second": self._tokens / self._seconds,
            "time/supervised_tokens_per_second": self._supervised / self._seconds,
            "time/images_per_second": self._images / self._seconds,
            "time/step_seconds": self._seconds / self._steps,
            "time/data_wait_share": self._wait_seconds / self._seconds,
        }
        if self._capacity:
            metrics["data/fill"] = self._tokens / self._capacity
        metrics |= self._perf()
        self._reset()
        return metrics | peak_memory()

    def _perf(self) -> dict[str, float]:
        if not self._useful:
            return {}
        useful, executed = (flops / self._seconds / self._num_ranks / 1e12 for flops in (self._useful, self._executed))
        found = {"perf/tflops_per_rank": useful}
        if self._peak_tflops is not None:
            found |= {"perf/mfu": useful / self._peak_tflops, "perf/hfu": executed / self._peak_tflops}
        return found


def peak_memory() -> dict[str, float]:
    """Returns the peaks of this process, in GiB: resident memory since its start, and CUDA memory since the last call.

    CUDA memory is what PyTorch's allocator reserved, which is what has to fit on the card.
    """
    # getrusage(2): kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    if torch.cuda.is_available():
        peaks["memory/peak_cuda_gib"] = torch.cuda.max_memory_reserved() / GIB
        torch.cuda.reset_peak_memory_stats()
    return peaks
