"""What `tests.forks` does before it forks: imports all that runs import, and what is done once by every process."""

import gc
import importlib
from contextlib import suppress
from pathlib import Path

import torch

from eagle_train.model.pass_flops import step_flops
from eagle_train.train import app  # noqa: F401
from eagle_train.train.config import load_config
from eagle_train.train.zero import engine  # noqa: F401
from eagle_train.train.zero.join import import_deepspeed
from tests.runs import overrides
from tests.toys import TILE, tiny_model

LATER = (
    "PIL.PngImagePlugin",
    "dateutil.parser",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "eagle_train.model.attention.varlen",
    "pandas",
    "torch._dynamo.backends.debugging",
    "torch._dynamo.repro.after_aot",
    "torch._inductor.compile_fx",
    "transformers.models.llama.modeling_llama",
)
"""Imported when an engine, a model or a table is made: as many modules again. Not every version has each of them."""

import_deepspeed()
for name in LATER:
    with suppress(ImportError):
        importlib.import_module(name)
load_config(overrides(Path("data"), Path("run")))  # Hydra looks for its plugins
with torch.random.fork_rng(), torch.device("meta"):
    step_flops(tiny_model(), TILE, recomputed=True)  # Torch looks for what it has on the meta device
gc.collect()
gc.freeze()  # no fork looks for garbage in it, or copies its pages
