"""Runs whose clock goes on when told."""

from eagle_train.track.timeline import read_timeline


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def kill(goodput):
    """What SIGKILL leaves: nothing more is written."""
    goodput._file.close()
    goodput._stopped.set()


def train(goodput, clock, first, last, *, wait=1.0, step=3.0):
    with goodput.phase("training"):
        for number in range(first + 1, last + 1):
            with goodput.phase("data_wait"):
                clock.pass_(wait)
            clock.pass_(step)
            goodput.reach(number)


def save(goodput, clock, seconds=2.0):
    goodput.saved()
    with goodput.phase("checkpoint"):
        clock.pass_(seconds)


def seconds_of(path):
    return {name: value for name, value in read_timeline(path).totals().items() if value}
