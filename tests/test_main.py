"""The command line's first word, and how it ends."""

import os
import subprocess
import sys

import pytest

from eagle_train.__main__ import run
from tests.runs import environment


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "eagle_train", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment(), text=True)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_another_pipe_that_broke_is_no_reader_that_has_seen_enough(monkeypatch):
    def broken(arguments):
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr("eagle_train.__main__.main", broken)
    with pytest.raises(BrokenPipeError, match="a worker's"):
        run()


QUESTIONS = """
import sys
from eagle_train.__main__ import main
from eagle_train.tools import report, trace

codes = [main(["train", "--help"]), main(["+experiment=toy", "--cfg"]), main(["+experiment=tooy"])]
assert codes == [0, 0, 1], codes
assert not {"torch", "transformers", "webdataset"} & sys.modules.keys()
"""


def test_questions_mistakes_and_tools_that_only_read_records_do_not_wait_for_torch():
    done = subprocess.run([sys.executable, "-c", QUESTIONS], capture_output=True, env=environment(), text=True)
    assert done.returncode == 0 and "did you mean 'toy'" in done.stderr, done.stderr
