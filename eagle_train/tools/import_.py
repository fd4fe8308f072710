"""`python -m eagle_train import FOLDER OUT [--experiment NAME]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle_train.train.released import import_config, import_released


def main(arguments: list[str]) -> int:
    """Imports; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train import",
        description="Turns a released Eagle 1 checkpoint into a folder for `chat`, `export` and `init_from`.",
    )
    parser.add_argument("folder", type=Path, help="with config.json, tokenizer, and safetensors or .bin files")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--experiment", help="take mixture, template and data settings of this one; default: parity")
    options = parser.parse_args(arguments)
    done = import_released(options.folder, options.out, import_config(options.folder, options.experiment))
    print(f"{options.out}: {len(done.match.names)} tensors; encoders {', '.join(done.towers)}")
    print(f"kept apart, not used by the model: {len(done.match.unused)} tensors{among(done.match.unused)}")
    if done.strays:
        print(f"not part of the checkpoint, not read: {', '.join(done.strays)}")
    return 0


def among(names: list[str]) -> str:
    """Returns the parts that names are of, for the terminal."""
    parts = sorted({name.rpartition("vision_tower.")[2].split(".")[0] for name in names})
    return f" ({', '.join(parts)})" if parts else ""
