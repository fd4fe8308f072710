"""Shared by all tests: no network, one thread, a small data set."""

import gc
import os
import signal

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}

import pytest
import torch

from tests.runs import config, losses, make_data

torch.set_num_threads(1)  # sums are added in the same order in every run that is compared to the bit
# The processes that tests start, a hundred and more, would otherwise each compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.disable()  # nothing that is imported is garbage; see `pytest_collection_finish`


def pytest_collection_finish():
    """Ends what is only for imports, which no test looks for garbage in."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    """Lets the interpreter take apart what it imported, or libraries complain of leaks."""
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    """Puts what takes a minute or more first where tests share cores, so that in the end none waits for it alone.

    Without pytest-xdist the order stays, so that what fails fast does so early.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small toy data set with its tokenizer and recipe `small.yaml`; tests must not change it."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory):
    """A small run of 9 steps (3 of pretrain, 6 of sft) that others are compared with; tests must not change it."""
    from eagle_train.train.app import train  # most tests train nothing

    run = tmp_path_factory.mktemp("undisturbed")
    assert train(config(data, run))
    assert len(losses(run)) == 9
    return run
