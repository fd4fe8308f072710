"""The command line's first word, and how it ends."""

import os
import subprocess
import sys

from tests.runs import environment


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "eagle_train", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment(), text=True)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""
