"""Signals that ask the run to save and end: SIGTERM and SIGUSR1 (schedulers), SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run saved its state and wants to be started again."""


class PreemptionFlag:
    """Remembers that a signal came; the trainer asks at every step, all ranks together.

    A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {number: signal.signal(number, self._set) for number in SIGNALS}

    def _set(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def close(self) -> None:
        """Restores the handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
