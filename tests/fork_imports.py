"""What `tests.forks` imports before it forks: of the libraries that take long, all that runs import."""

import gc
import importlib
from contextlib import suppress

from eagle_train.tools import train  # noqa: F401
from eagle_train.train.zero import engine  # noqa: F401
from eagle_train.train.zero.join import import_deepspeed
from tests import runs, toys  # noqa: F401

LATER = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "torch._dynamo.backends.debugging",
    "torch._dynamo.repro.after_aot",
    "torch._inductor.compile_fx",
    "transformers.models.llama.modeling_llama",
)
"""Imported when an engine or a model is made: half as many modules again. Not every version has each of them."""

import_deepspeed()
for name in LATER:
    with suppress(ImportError):
        importlib.import_module(name)
gc.freeze()  # no fork looks for garbage in it, or copies its pages
