"""Measures one loader at a time, each in a process of its own, so none inherits another's state."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch


@dataclass(frozen=True)
class Rate:
    """One repetition."""

    samples_per_second: float
    """By the clock."""
    cpu_seconds: float
    """Per sample, of the consuming process and all workers."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """How long steps of a given time waited for their data; shares are wait / (wait + step)."""

    utilisation: float
    """Samples the steps consume over samples the loader can give."""
    step_seconds: float
    """Mean time of a step."""
    num_steps: int
    mean: float
    p99: float
    maximum: float
    above_bar: int
    """Steps above 2 %."""


BAR = 0.02


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what `function` returns, run in a forked process that ends with all of its children."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)
        sender.send(function(*arguments))

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(f"the measuring process ended with code {process.exitcode}; see above") from error
    finally:
        process.join()


def cpu_seconds() -> float:
    """Returns the processor time of this process and its living children."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [process.cpu_times() for process in processes]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def measure(batches: Iterator[int], warm_up_seconds: float, seconds: float) -> Rate:
    """Returns the rate at which `batches`, numbers of samples, come once the loader has its speed."""
    next(batches)  # start-up is not measured
    end = time.perf_counter() + warm_up_seconds
    while time.perf_counter() < end:
        next(batches)
    samples, cpu, start = 0, cpu_seconds(), time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        samples += next(batches)
    return Rate(samples / (now - start), (cpu_seconds() - cpu) / samples)


def simulate(
    steps: Iterator[int], gpu_samples_per_second: float, utilisation: float, seconds: float, skip: int
) -> Wait:
    """Returns the waits of a toy GPU that trains on so many samples per second, asleep meanwhile.

    A step takes as long as its samples need.

    Args:
        steps: samples of each.
        skip: first steps, which wait for the workers to start, are left out.
    """
    shares, times = [], []
    end = None
    while end is None or time.perf_counter() < end:
        start = time.perf_counter()
        samples = next(steps)
        wait = time.perf_counter() - start
        step = samples / gpu_samples_per_second
        time.sleep(step)
        shares.append(wait / (wait + step))
        times.append(step)
        if len(shares) == skip:
            end = time.perf_counter() + seconds
    counted = np.array(shares[skip:])
    return Wait(
        utilisation=utilisation,
        step_seconds=float(np.mean(times[skip:])),
        num_steps=len(counted),
        mean=float(counted.mean()),
        p99=float(np.quantile(counted, 0.99)),
        maximum=float(counted.max()),
        above_bar=int((counted > BAR).sum()),
    )
