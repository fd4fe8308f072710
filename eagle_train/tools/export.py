"""`python -m eagle_train export RUN [--out DIR] [--layout LAYOUT]`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from eagle_train.train import export_eagle2, released_eagle1, released_qwen2_vl
from eagle_train.train.load import export_adapter, export_run


def export_native(run: Path, out: Path) -> list[str]:
    """Writes the layout of this package; returns nothing, since nothing is lost."""
    export_run(run, out)
    return []


def export_peft(run: Path, out: Path) -> list[str]:
    """Writes the LLM's adapters alone, as peft has them; returns nothing."""
    export_adapter(run, out)
    return []


LAYOUTS = {
    "native": export_native,
    "eagle1": released_eagle1.export_released,
    "eagle2": export_eagle2.export_released,
    "qwen2_vl": released_qwen2_vl.export_released,
    "mm_projector": released_eagle1.export_projector,
    "adapter": export_peft,
}


def main(arguments: list[str]) -> int:
    """Exports; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train export",
        description="Writes safetensors, config and tokenizer of a run's newest checkpoint.",
    )
    parser.add_argument("run", type=Path, help="run folder, for example runs/toy, or an export")
    parser.add_argument("--out", type=Path, help="default: RUN/export, with another layout's name behind it")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="native",
        help="native: for `chat` and `init_from`; eagle1: as the released Eagle 1 checkpoints; eagle2: as those of "
        "Eagle 2 and 2.5, for vLLM and transformers; qwen2_vl: as Qwen2-VL on the hub; mm_projector: only the "
        "projector, as LLaVA's first stage; adapter: only the LLM's LoRA, as peft has it, which the others hold merged",
    )
    parser.add_argument("--adapter", dest="layout", action="store_const", const="adapter", help="--layout adapter")
    parser.add_argument(
        "--pooling-head", action="store_true", help="eagle2: write SigLIP's unused pooling head even if there was none"
    )
    options = parser.parse_args(arguments)
    name = "export" if options.layout == "native" else f"export-{options.layout}"
    out = options.out or options.run / name
    export = LAYOUTS[options.layout]
    if options.pooling_head:
        if options.layout != "eagle2":
            parser.error("--pooling-head is for --layout eagle2")
        export = partial(export, pooling_head=True)
    for difference in export(options.run, out):
        print(f"warning: the original code cannot run this model: {difference}", file=sys.stderr)
    print(out)
    return 0
