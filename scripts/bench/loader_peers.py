"""The peers of the loader benchmark, each used as its documentation says, and the bare work without a loader.

All shuffle, batch, and prefetch alike and do the same work per sample. Peers are imported where they are used, so
those that are not installed are left out.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import webdataset
from loader_data import Paths, members
from loader_work import ONE_TILE, Task, Work, parse_sample

PACKAGES = {"webdataset": "webdataset", "energon": "megatron-energon", "mosaic": "mosaicml-streaming"}
"""The distribution of each peer."""


def versions() -> dict[str, str | None]:
    """Returns the version of each peer, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@dataclass
class DictSample:
    """The `map` of a pipeline of dicts with the members' bytes."""

    work: Work

    def __call__(self, sample: dict[str, Any]) -> Any:
        """Returns the encoded sample."""
        return self.work.encode(sample["__key__"], sample["jpg"], sample["json"])


def webdataset_loader(task: Task) -> Iterator[int]:
    """Yields the samples of each batch of webdataset's pipeline."""
    work = Work(task.make_encoder())
    urls = [str(tar) for tar in Paths(task.root).tars()]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=task.seed)
        .repeat()
        .shuffle(task.shuffle)
        .map(DictSample(work))
        .batched(task.batch, collation_fn=work.join)
    )
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=task.workers, prefetch_factor=task.prefetch if task.workers else None
    )
    for batch in loader:
        yield len(batch["keys"])


def energon_loader(task: Task) -> Iterator[int]:
    """Yields the samples of each batch of megatron-energon: crude samples, cooked and encoded by a task encoder."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )
    from megatron.energon.errors import reraise_exception

    work = Work(task.make_encoder())

    @dataclass
    class Raw(Sample):
        jpg: bytes
        json: bytes

    @stateless
    def cook(sample: dict) -> Raw:
        return Raw(**basic_sample_keys(sample), jpg=sample["jpg"], json=sample["json"])

    class BenchTaskEncoder(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(cook),)

        @stateless
        def encode_sample(self, sample: Raw):
            return work.encode(sample.__key__, sample.jpg, sample.json)

        def batch(self, samples):
            return work.join(samples)

    config = WorkerConfig(
        rank=0, world_size=1, num_workers=task.workers, seed_offset=task.seed, global_error_handler=reraise_exception
    )
    dataset = get_train_dataset(
        str(Paths(task.root).shards),
        worker_config=config,
        batch_size=task.batch,
        shuffle_buffer_size=task.shuffle,
        max_samples_per_sequence=100,
        task_encoder=BenchTaskEncoder(),
    )
    for batch in get_savable_loader(dataset, prefetch_factor=task.prefetch):
        yield len(batch["keys"])


def mosaic_loader(task: Task) -> Iterator[int]:
    """Yields the samples of each batch of mosaicml-streaming, over its own copy of the data."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    work = Work(task.make_encoder())

    class BenchDataset(StreamingDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return work.encode(sample["key"], sample["jpg"], sample["json"])

    clean_stale_shared_memory()  # of the repetition before
    dataset = BenchDataset(
        local=str(Paths(task.root).mds),
        shuffle=True,
        shuffle_seed=task.seed,
        batch_size=task.batch,
        epoch_size=task.num_samples,
    )
    loader = StreamingDataLoader(
        dataset,
        batch_size=task.batch,
        collate_fn=work.join,
        num_workers=task.workers,
        prefetch_factor=task.prefetch if task.workers else None,
    )
    for batch in loader:
        yield len(batch["keys"])


def bare(task: Task, warm_up_seconds: float, seconds: float, limit: int = 500) -> tuple[int, float]:
    """Returns samples and processor seconds of processes that only decode, resize and tokenize, without a loader.

    Args:
        limit: samples held in memory, over which each process loops.
    """
    work = Work(task.make_encoder())
    held = []
    for key, contents in members(Paths(task.root)):
        held.append((parse_sample(key, contents["json"]), contents["jpg"]))
        if len(held) == limit:
            break
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ready = context.Barrier(task.workers)

    def loop(first: int) -> None:
        torch.set_num_threads(1)
        tile = work.encoder.new_tiles([ONE_TILE])
        ready.wait()
        number, start, cpu, end = first, None, 0.0, time.perf_counter() + warm_up_seconds
        while True:
            now = time.perf_counter()
            if now >= end:
                if start is not None:
                    break
                number, start, cpu, end = first, now, time.process_time(), now + seconds
            work.bare(*held[number % len(held)], tile)
            number += 1
        # Scaled to the asked time: the last sample ends a little after it.
        results.put(((number - first) * seconds / (now - start), time.process_time() - cpu))

    processes = [context.Process(target=loop, args=(limit * n // task.workers,)) for n in range(task.workers)]
    for process in processes:
        process.start()
    counts, cpus = zip(*[results.get() for _ in processes], strict=True)
    for process in processes:
        process.join()
    return sum(counts), sum(cpus)


LOADERS = {"webdataset": webdataset_loader, "energon": energon_loader, "mosaic": mosaic_loader}
