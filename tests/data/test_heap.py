"""Memory that is freed and asked for again stays with the process."""

import os
import subprocess
import sys

import pytest

ROUNDS, BLOCKS, BLOCK = 20, 3, 3 << 20
"""As with pictures: some are alive at a time, then all are freed."""

COUNT = f"""
import resource
from eagle_train.data.heap import keep_freed_memory

keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    blocks = [b"x" * {BLOCK} for _ in range({BLOCKS})]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc is told")
def test_pages_of_freed_memory_are_not_asked_for_again():
    run = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    once = BLOCKS * BLOCK // os.sysconf("SC_PAGE_SIZE")
    assert 0 < int(run.stdout) < 2 * once
