"""`python -m eagle_train export RUN [--out DIR] [--checkpoint STEP] [--layout LAYOUT]`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from eagle_train.tools.given import given
from eagle_train.train import export_eagle2, export_internvl, released_eagle1, released_qwen2_vl
from eagle_train.train.load import (
    CARRIED,
    CONFIG,
    check_empty,
    export_adapter,
    export_run,
    is_export,
    parse_config,
)

Export = Callable[[Path, Path], list[str]]
"""Writes an export (first) in a released layout (second); returns what the original code cannot reproduce of it."""

LAYOUTS: dict[str, Export | None] = {
    "native": None,
    "eagle1": released_eagle1.export_released,
    "eagle2": export_eagle2.export_released,
    "internvl": export_internvl.export_original,
    "internvl-hf": export_internvl.export_native,
    "qwen2_vl": released_qwen2_vl.export_released,
    "mm_projector": released_eagle1.export_projector,
}


SPECIAL = ("pooling_head", "imagenet_pixels")
"""Options of the layout eagle2."""


def through_native(run: Path, out: Path, export: Export, step: int | None, check: bool | None) -> list[str]:
    """Writes a run in a released layout: from weights on disk, so that they need not all be in memory.

    What the run's `init_from` keeps of a release is found as if the run had kept it.
    """
    check_empty(out)
    native = out.with_name(f".{out.name}.native")
    shutil.rmtree(native, ignore_errors=True)
    try:
        export_run(run, native, step=step, check=check)
        began_with = parse_config(run / CONFIG).get("init_from")
        if began_with is not None and (carried := Path(began_with).resolve() / CARRIED).is_dir():
            (native / CARRIED).symlink_to(carried, target_is_directory=True)
        return export(native, out)
    finally:
        shutil.rmtree(native, ignore_errors=True)


def check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with a message if an option would do nothing beside the others."""
    if options.layout != "eagle2" and (special := given(parser, options, SPECIAL)):
        parser.error(f"{special[0]} is for --layout eagle2")
    if options.check is not None and options.layout == "adapter":
        parser.error("--check compares the logits of a whole model; --layout adapter writes adapters alone")
    if not is_export(options.run):
        return
    if options.checkpoint is not None:
        parser.error("--checkpoint is for runs; an export holds one model")
    if options.check is not None and options.layout != "native":
        parser.error(f"--check compares a run with its export; of an export, --layout {options.layout} has no check")


def main(arguments: list[str]) -> int:
    """Exports; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train export",
        description="Writes safetensors, config and tokenizer of a checkpoint of a run.",
    )
    parser.add_argument("run", type=Path, help="run folder, for example runs/toy, or an export")
    parser.add_argument("--out", type=Path, help="default: RUN/export, with another layout's name behind it")
    parser.add_argument(
        "--layout",
        choices=[*LAYOUTS, "adapter"],
        default="native",
        help="native: for `chat` and `init_from`; eagle1: as the released Eagle 1 checkpoints; eagle2: as those of "
        "Eagle 2 and 2.5, for vLLM and transformers; internvl: as the original code of InternVL2 writes them; "
        "internvl-hf: for transformers' own InternVLForConditionalGeneration; "
        "qwen2_vl: as Qwen2-VL on the hub; mm_projector: only the projector, as LLaVA's first stage; "
        "adapter: only the LLM's LoRA, as peft has it, which the others hold merged",
    )
    parser.add_argument("--adapter", dest="layout", action="store_const", const="adapter", help="--layout adapter")
    parser.add_argument(
        "--pooling-head", action="store_true", help="eagle2: write SigLIP's unused pooling head even if there was none"
    )
    parser.add_argument(
        "--imagenet-pixels",
        action="store_true",
        help="eagle2: write a SigLIP for pixels with ImageNet's mean and std, which vLLM gives to this family",
    )
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="of this global step of the run; default: the newest whole one"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="compare the logits of a sample before and after, in host memory; default: if the model fits into it",
    )
    options = parser.parse_args(arguments)
    name = "export" if options.layout == "native" else f"export-{options.layout}"
    out = options.out or options.run / name
    check_together(parser, options)
    if options.layout == "adapter":
        print(export_adapter(options.run, out, step=options.checkpoint))
        return 0
    export = LAYOUTS[options.layout]
    if special := {name: True for name in SPECIAL if getattr(options, name)}:
        export = partial(export, **special)
    differences = []
    if export is None:
        export_run(options.run, out, step=options.checkpoint, check=options.check)
    elif is_export(options.run):
        differences = export(options.run, out)
    else:
        differences = through_native(options.run, out, export, options.checkpoint, options.check)
    for difference in differences:
        print(f"warning: the original code cannot run this model: {difference}", file=sys.stderr)
    print(out)
    return 0
