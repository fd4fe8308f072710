"""When a run has to save and end: a signal came, or the wall time of its job is near."""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable
from types import FrameType

from eagle_train import dist, slurm

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM and SIGUSR1 are the scheduler's, SIGINT is Ctrl-C."""

REMEMBERED = 50
"""Steps of which the longest counts."""


class Preempted(Exception):
    """A run was asked to end while it made ready for a stage."""


class PreemptionFlag:
    """Whether this rank wants the run to save and end; the trainer asks at every step, all ranks together.

    A signal may reach one rank only, or late: the ranks agree, and all of them end after the same step. A second
    SIGINT interrupts at once. Rank 0 looks at the wall time too, so that a run is saved where no signal comes.

    Args:
        margin_seconds: of wall time that shall be left when the state is saved.
        save_seconds: that a checkpoint is taken to last before one of the stage was measured; then the longest so far
            counts.
        end_time: returns the end of the job, seconds since the epoch, or None; asked again before it is acted upon,
            since limits get extended.

    Attributes:
        writing: returns whether a save is being written in the background, which the last one has to wait for.
    """

    def __init__(
        self,
        *,
        margin_seconds: float = 60.0,
        save_seconds: float = 120.0,
        end_time: Callable[[], float | None] = slurm.end_time,
    ) -> None:
        self.signal: int | None = None
        self.writing: Callable[[], bool] = lambda: False
        self._margin_seconds = margin_seconds
        self._guess = self._save_seconds = save_seconds
        self._measured = False
        self._end_time = end_time
        self._end = end_time() if dist.rank() == 0 else None
        self._asked_at: float | None = None
        self._step_seconds: deque[float] = deque([0.0], maxlen=REMEMBERED)
        self._before = {number: signal.signal(number, self._set) for number in SIGNALS}

    def _set(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self) -> bool:
        """Returns whether to end after this step; called once in every step."""
        now = time.time()
        if self._asked_at is not None:
            self._step_seconds.append(now - self._asked_at)
        self._asked_at = now
        return self.wanted()

    def wanted(self) -> bool:
        """Returns whether to end, where no step is taken."""
        return self._time_is_short(time.time()) or self.signal is not None

    def _time_is_short(self, now: float) -> bool:
        # The step that is asked about is still to be done, and so is the next if this one is not the last.
        save_seconds = self._save_seconds * (1 + self.writing())
        needed = self._margin_seconds + save_seconds + 2 * max(self._step_seconds)
        if self._end is None or self._end - now > needed:
            return False
        self._end = self._end_time() or self._end
        if self._end - now > needed:
            return False
        log.warning(
            "the job's wall time ends in %.0f s; a save takes %.0f s, a step %.1f s, and preemption.margin_seconds is "
            "%.0f: saving now",
            self._end - now,
            save_seconds,
            max(self._step_seconds),
            self._margin_seconds,
        )
        return True

    def begin_stage(self) -> None:
        """Tells that a stage begins: what was made ready since the last step was no step.

        Its checkpoints may be larger, as where a projector was trained and now all is: until one is measured, the guess
        counts again if it is longer than those before.
        """
        self._asked_at = None
        self._save_seconds, self._measured = max(self._guess, self._save_seconds), False

    def saved(self, seconds: float) -> None:
        """Tells how long a checkpoint took, from its begin to its publication, in seconds."""
        self._save_seconds = max(seconds, self._save_seconds if self._measured else 0.0)
        self._measured = True

    def close(self) -> None:
        """Restores the handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def requeue() -> None:
    """Has SLURM run the job again, after the state was saved and the trackers closed; all ranks call it.

    It is rank 0 who asks, before any rank ends: `srun --kill-on-bad-exit` would end it first. From then on the job's
    processes are being killed.
    """
    if dist.rank() == 0:
        slurm.requeue()
    dist.barrier()


def ignore_signals() -> None:
    """Passes over what comes while a process that has saved its state ends, so that its exit code is its own."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
