"""What imports have in common with each other: nothing that they make is garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage() -> Iterator[None]:
    """Keeps Python from looking for garbage meanwhile, as it does again and again while objects are made.

    Modules stay, with all that they hold. Measured for training: 4.7 s of processor time instead of 5.6 s.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def kept() -> Iterator[None]:
    """Keeps Python from looking for garbage in all that there is now, meanwhile; does nothing where some is kept so.

    Afterwards it may be taken apart again, or libraries say in the end that they leak. Measured for training with
    DeepSpeed, which asks for four full collections when it starts: 1.6 s less of processor time.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
