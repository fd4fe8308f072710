"""Files that would run foreign code are refused before anything reads them."""

import os

import pytest
import torch

from eagle_train.train.pickles import check_pickles


class Call:
    def __reduce__(self):
        return os.getcwd, ()


def test_a_file_that_calls_something_foreign_is_refused(tmp_path):
    torch.save({"module": {"w": torch.zeros(2)}}, tmp_path / "good.pt")
    check_pickles(tmp_path)
    torch.save({"module": Call()}, tmp_path / "zz.pt")
    with pytest.raises(ValueError, match=r"zz.pt was not written by DeepSpeed: it would call posix.getcwd"):
        check_pickles(tmp_path)
