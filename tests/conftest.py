"""Shared by all tests: no network, one thread, a small data set."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch

from tests.runs import make_data

torch.set_num_threads(1)  # sums are added in the same order in every run that is compared to the bit
# The processes that tests start, a hundred and more, would otherwise each compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small toy data set with its tokenizer and recipe `small.yaml`; tests must not change it."""
    return make_data(tmp_path_factory.mktemp("data"))
