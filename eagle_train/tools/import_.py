"""`python -m eagle_train import FOLDER OUT [--experiment NAME]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from eagle_train.model.checkpoints.families import EAGLE1, EAGLE2, INTERNVL, QWEN2_VL, detect
from eagle_train.model.checkpoints.files import read_weights
from eagle_train.train import released_eagle1, released_eagle2, released_internvl, released_qwen2_vl
from eagle_train.train.released import read_original

FAMILIES = {
    EAGLE1: released_eagle1,
    EAGLE2: released_eagle2,
    INTERNVL: released_internvl,
    QWEN2_VL: released_qwen2_vl,
}
NESTED = "vision_model.vision_model."
"""How the names of a SigLIP alone begin."""


def main(arguments: list[str]) -> int:
    """Imports; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train import",
        description="Turns a released checkpoint of Eagle 1, 2 or 2.5, InternVL2 or Qwen2-VL into a folder for `chat`, "
        "`export` and `init_from`.",
    )
    parser.add_argument("folder", type=Path, help="with config.json, tokenizer, and safetensors or .bin files")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--experiment", help="take mixture, template and data of this one; default: as released")
    options = parser.parse_args(arguments)
    original = read_original(options.folder)
    family = FAMILIES[detect(original, read_weights(options.folder).keys())]
    config = family.import_config(options.folder, options.experiment)
    done = family.import_released(options.folder, options.out, config)
    print(f"{options.out}: {len(done.match.names)} tensors; encoders {', '.join(done.towers)}")
    print(f"kept apart, not used by the model: {len(done.match.unused)} tensors{among(done.match.unused)}")
    if done.strays:
        print(f"not part of the checkpoint, not read: {', '.join(done.strays)}")
    return 0


def among(names: list[str]) -> str:
    """Returns the parts that names are of, for the terminal."""
    parts = sorted({name.rpartition("vision_tower.")[2].removeprefix(NESTED).split(".")[0] for name in names})
    return f" ({', '.join(parts)})" if parts else ""
