"""Time and memory of each vision encoder beside the library's own model, called bare on prepared images.

    python scripts/bench/encoders.py --size tiny
    python scripts/bench/encoders.py --size full --layers 2 --shrink 2 --encoders sam eva02   # real width on a CPU
    python scripts/bench/encoders.py --size full --device cuda --batch 4

Ours runs twice: `ours` on uint8 tiles, which it normalizes and resizes, and `encode` on images that are ready,
which is all that the library's model, `bare`, does. They take turns, and swap who goes first; medians are
compared. Seconds are wall time on a GPU and processor time on a CPU, which may be shared. Memory is what autograd
keeps for the backward pass, and on a GPU also the peak. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn
from transformers import CLIPVisionModel, Pix2StructVisionModel, SamVisionModel

from eagle_train.model.encoders.base import VisionEncoder
from eagle_train.train.config import build, load_config

CONFIGS = {  # by size and kind
    "tiny": {
        "clip": "toy_vit",
        "convnext": "toy_convnext",
        "sam": "toy_sam",
        "eva02": "toy_eva02",
        "pix2struct": "toy_pix2struct",
    },
    "full": {
        "clip": "clip_l14_336",
        "convnext": "convnext_xxl_1024",
        "sam": "sam_l_1024",
        "eva02": "eva02_l_det_1024",
        "pix2struct": "pix2struct_l_1024",
    },
}
TILES = {"tiny": 64, "full": 1024}
"""Side of the tiles in pixels."""

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Medians of one model: seconds, bytes kept for the backward pass, bytes at the peak (0 on a CPU)."""

    forward_seconds: float
    backward_seconds: float
    kept_bytes: int
    peak_bytes: int


def config_node(name: str, layers: int | None, shrink: int) -> dict[str, Any]:
    """Returns an encoder's config, with its depth cut to `layers` transformer layers (or blocks per stage).

    Args:
        shrink: divides the side of the images.
    """
    config = load_config(["+experiment=toy", f"+encoder@mixture.encoders.bench={name}"])
    node = config["mixture"]["encoders"]["bench"]
    node["image_size"] //= shrink
    if layers is not None:
        if "name" in node:
            node["depths"] = [min(layers, depth) for depth in (3, 4, 30, 3)]
        else:
            node["num_hidden_layers"] = layers
        if "global_layers" in node:
            node["global_layers"] = [layers - 1]
    return node


def bare_clip(node: dict[str, Any], encoder: VisionEncoder) -> tuple[nn.Module, Forward]:
    """Returns embeddings, first norm and layers: with the class token, without the last norm."""
    model = CLIPVisionModel(encoder.vit.config)

    def forward(images: torch.Tensor) -> torch.Tensor:
        tokens = model.pre_layrnorm(model.embeddings(images))
        return model.encoder(inputs_embeds=tokens).last_hidden_state

    return model, forward


def bare_convnext(node: dict[str, Any], encoder: VisionEncoder) -> tuple[nn.Module, Forward]:
    """Returns the trunk up to the stage that is used."""
    shape = {key: node[key] for key in ("depths", "dims") if key in node}
    model = timm.create_model(node["name"], num_classes=0, **shape)
    stages = model.stages[: node.get("stage", 3) + 1]
    return nn.ModuleList([model.stem, stages]), lambda images: stages(model.stem(images))


def bare_sam(node: dict[str, Any], encoder: VisionEncoder) -> tuple[nn.Module, Forward]:
    """Returns the vision model with the half of its neck that is used."""
    model = SamVisionModel(encoder.sam.config)
    neck = model.vision_encoder.neck
    neck.conv2, neck.layer_norm2 = nn.Identity(), nn.Identity()
    return model, lambda images: model(images).last_hidden_state


def bare_eva02(node: dict[str, Any], encoder: VisionEncoder) -> tuple[nn.Module, Forward]:
    """Returns timm's windowed transformer with rotary positions: queries, keys and values in one layer."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = VisionTransformerSAM(
        img_size=node["image_size"],
        patch_size=node["patch_size"],
        embed_dim=node["hidden_size"],
        depth=node["num_hidden_layers"],
        num_heads=node["num_attention_heads"],
        mlp_ratio=node["mlp_ratio"],
        mlp_layer=lambda act_layer, **sizes: SwiGLU(norm_layer=norm, **sizes),
        use_rope=True,
        use_rel_pos=False,
        window_size=node["window_size"],
        global_attn_indexes=tuple(node["global_layers"]),
        ref_feat_shape=((node["rotary_grid"],) * 2,) * 2,
        neck_chans=0,
        num_classes=0,
    )
    model.neck = nn.Identity()
    return model, model.forward_features


def bare_pix2struct(node: dict[str, Any], encoder: VisionEncoder) -> tuple[nn.Module, Forward]:
    """Returns the whole vision model on ready patches, without padding."""
    model = Pix2StructVisionModel(encoder.vit.config)
    ids = torch.arange(1.0, encoder.grid + 1)
    places = torch.stack(torch.meshgrid(ids, ids, indexing="ij"), dim=-1).view(1, -1, 2)

    def forward(images: torch.Tensor) -> torch.Tensor:
        patch = node["patch_size"]
        patches = nn.functional.unfold(images, patch, stride=patch).transpose(1, 2)
        ready = torch.cat([places.to(patches).expand(len(patches), -1, -1), patches], dim=-1)
        return model(ready).last_hidden_state

    return model, forward


BARE = {
    "clip": bare_clip,
    "convnext": bare_convnext,
    "sam": bare_sam,
    "eva02": bare_eva02,
    "pix2struct": bare_pix2struct,
}


def now(device: torch.device) -> float:
    """Returns the time in seconds when the device is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(forward: Forward, inputs: torch.Tensor) -> tuple[float, float, int]:
    """Returns seconds forward, seconds backward and peak bytes of one pass."""
    device = inputs.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = now(device)
    loss = forward(inputs).float().square().mean()
    middle = now(device)
    loss.backward()
    end = now(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return middle - start, end - middle, peak


def kept_bytes(forward: Forward, inputs: torch.Tensor, parameters: Sequence[nn.Parameter]) -> int:
    """Returns the bytes of the tensors that autograd keeps, each storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward(inputs)
    return sum(storage.nbytes() for storage in kept.values())


def compare(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the costs of one encoder, and ours over the library's."""
    node = config_node(CONFIGS[args.size][kind], args.layers, args.shrink)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours = build(node)
    bare, bare_forward = BARE[kind](node, ours)
    ours, bare = ours.to(device, dtype).train(), bare.to(device, dtype).train()
    side = TILES[args.size] // args.shrink
    tiles = torch.randint(0, 256, (args.batch, 3, side, side), dtype=torch.uint8, device=device)
    images = ours.normalize(tiles, ours.input_size)
    runs = {
        "ours": (ours, ours, tiles),
        "encode": (ours, ours.encode, images),
        "bare": (bare, bare_forward, images),
    }
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
    for turn in range(args.iterations + 1):
        for name in reversed(runs) if turn % 2 else runs:
            model, forward, inputs = runs[name]
            times[name].append(timed(forward, inputs))
            model.zero_grad()
    found = {}
    for name, (model, forward, inputs) in runs.items():
        forwards, backwards, peaks = zip(*times[name][1:], strict=True)  # the first pass warms up
        found[name] = Cost(
            forward_seconds=statistics.median(forwards),
            backward_seconds=statistics.median(backwards),
            kept_bytes=kept_bytes(forward, inputs, list(model.parameters())),
            peak_bytes=max(peaks),
        )
    result = {name: asdict(cost) for name, cost in found.items()}
    seconds = {name: cost.forward_seconds + cost.backward_seconds for name, cost in found.items()}
    return result | {
        "ratio": {
            "seconds": seconds["ours"] / seconds["bare"],
            "encode_seconds": seconds["encode"] / seconds["bare"],
            "kept_bytes": found["ours"].kept_bytes / found["bare"].kept_bytes,
        }
    }


def report_line(kind: str, result: dict[str, Any]) -> str:
    """Returns one line of the table."""
    cells = [f"{kind:<11}"]
    for name in ("ours", "bare"):
        cost = result[name]
        seconds = f"{cost['forward_seconds']:8.4f} s + {cost['backward_seconds']:8.4f} s"
        cells.append(f"{name} {seconds} {cost['kept_bytes'] / 2**20:8.1f} MiB kept")
    ratio = result["ratio"]
    times = f"time x{ratio['seconds']:.3f}, of encode alone x{ratio['encode_seconds']:.3f}"
    return " | ".join([*cells, f"{times}, memory x{ratio['kept_bytes']:.3f}"])


def circumstances(device: str) -> dict[str, str]:
    """Returns hardware, command and commit."""
    chip = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    git = partial(subprocess.run, capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--", "../../eagle_train"]).stdout.strip()
    return {
        "hardware": f"{chip}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads",
        "command": "python " + " ".join(sys.argv),
        "commit": commit + (" with changes" if changed else ""),
        "versions": f"torch {torch.__version__}, timm {timm.__version__}",
    }


def cpu_name() -> str:
    """Returns the processor's name, or the machine's kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Compares the chosen encoders and prints a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(CONFIGS), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoders", nargs="+", choices=sorted(BARE), default=list(BARE))
    parser.add_argument("--layers", type=int, help="cut the depth to so many layers")
    parser.add_argument("--shrink", type=int, default=1, help="divide the side of the images")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1, help="tiles at once")
    args = parser.parse_args()
    facts = circumstances(args.device)
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    results = {}
    for kind in args.encoders:
        results[kind] = compare(kind, args)
        print(report_line(kind, results[kind]), flush=True)
    print(json.dumps(facts | {"results": results}))


if __name__ == "__main__":
    main()
