"""A window of steps under torch's profiler, and the memory of a GPU over those steps: files in the run folder.

    python -m eagle_train +experiment=... profiler=window profiler.start_step=20

`profile/steps-21-23-rank-00000.trace.json.gz` opens in https://ui.perfetto.dev or chrome://tracing, `.operations.txt`
holds the costliest operations, `.memory.pickle` opens in https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from eagle_train import dist

log = logging.getLogger(__name__)


class Profiler:
    """Profiles the global steps `start_step + 1` to `start_step + num_steps` of a run, on some ranks.

    The profiled steps are slower than the others, and their metrics are those of the profiler too. A start of the run
    that begins after `start_step` profiles nothing.

    Args:
        folder: of the run; the files go to `profile/` in it.
        start_step: optimizer steps of the run, over all its stages, that are done before. The first steps of a stage
            are not like the others: kernels are chosen, memory is allocated.
        num_steps: how many steps are profiled.
        ranks: which ranks do it.
        memory: record every allocation of the GPU, with the stack that asked for it, and write a snapshot.
        shapes: record the shapes of operations' inputs.
        stacks: record the Python stacks of operations; slow.
        rows: of the table of operations.

    Raises:
        ValueError: for an empty window, or for `memory` without a GPU.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start_step: int,
        num_steps: int = 3,
        ranks: Sequence[int] = (0,),
        memory: bool = False,
        shapes: bool = False,
        stacks: bool = False,
        rows: int = 30,
    ) -> None:
        if start_step < 0 or num_steps < 1:
            raise ValueError(f"profiler: start_step {start_step} and num_steps {num_steps} make no window")
        if memory and not torch.cuda.is_available():
            raise ValueError("profiler.memory records what CUDA's allocator does, and there is no GPU; set it false")
        self.start_step, self.end_step = start_step, start_step + num_steps
        self.memory, self.shapes, self.stacks, self.rows = memory, shapes, stacks, rows
        name = f"steps-{start_step + 1}-{self.end_step}-rank-{dist.rank():05d}"
        self.path = folder / "profile" / name
        self.mine = dist.rank() in ranks
        self.running: profile | None = None

    def at(self, step: int) -> None:
        """Begins the window where it is due, before a step.

        Args:
            step: global steps done.
        """
        if self.mine and step == self.start_step:
            self.close()  # one that the run came back from
            self._begin()

    def done(self, step: int) -> None:
        """Ends the window where it is due, right after a step: what follows the last one is no part of it.

        Args:
            step: global steps done.
        """
        if step >= self.end_step:
            self.close()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        if self.memory:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self.running = profile(
            activities=activities,
            record_shapes=self.shapes,
            profile_memory=self.memory,
            with_stack=self.stacks,
            acc_events=True,
        )
        self.running.start()

    def close(self) -> None:
        """Ends a window that is open, and writes its files; where they cannot be written, a warning says so."""
        if self.running is None:
            return
        running, self.running = self.running, None
        running.stop()
        try:
            self._write(running)
        except OSError as error:
            log.warning("the profile cannot be written: %s", error)
        else:
            log.warning("profiled steps are written to %s.*", self.path)
        finally:
            if self.memory:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, running: profile) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(f"{self.path}.trace.json.gz")
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=order, row_limit=self.rows)
        Path(f"{self.path}.operations.txt").write_text(table, encoding="utf-8")
        if self.memory:
            torch.cuda.memory._dump_snapshot(f"{self.path}.memory.pickle")
