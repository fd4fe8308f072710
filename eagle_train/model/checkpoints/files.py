"""Tensors by name in files: safetensors or torch's own, in one piece or in shards that an index names.

Files are mapped into memory, not read: a tensor costs memory when it is used, and the system may take it back.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
WEIGHT_FILES = (SAFETENSORS_INDEX, SAFETENSORS, "pytorch_model.bin.index.json", "pytorch_model.bin", "mm_projector.bin")
"""What a folder's weights are called; the first that is there counts."""
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".index.json")
WRAPPERS = ("ema_state", "module", "model", "state_dict")
"""Keys under which training codes keep the weights in a torch file that holds other things too."""
SHARD_BYTES = 5_000_000_000


class LazyWeights(Mapping[str, torch.Tensor]):
    """Weights by name that are read, or made, when they are asked for."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a weight, without reading it."""


def shape_of(weights: Mapping[str, torch.Tensor], name: str) -> torch.Size:
    """Returns the shape of one of several weights; nothing is read for it."""
    return weights.shape(name) if isinstance(weights, LazyWeights) else weights[name].shape


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file or folder by name, mapped into memory.

    Of a sharded folder, only what the index names is read.

    Raises:
        ValueError: if there are no weights, or a file or tensor that the index names is missing.
    """
    file = weights_file(path)
    if not file.name.endswith(".index.json"):
        return read_file(file)
    file_of = json.loads(file.read_text())["weight_map"]
    shards = {name: read_file(file.parent / name) for name in dict.fromkeys(file_of.values())}
    if missing := [f"{name} in {where}" for name, where in file_of.items() if name not in shards[where]]:
        raise ValueError(f"{file} names tensors that are not there: {listed(missing)}")
    return {name: shards[where][name] for name, where in file_of.items()}


def weights_file(path: Path) -> Path:
    """Returns the file of weights, or the index of several, of a file or folder.

    Raises:
        ValueError: if there is none.
    """
    if path.is_file():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    there = sorted(p.name for p in path.glob("*")) if path.is_dir() else "no such folder"
    raise ValueError(f"no weights at {path} ({there}); looked for {', '.join(WEIGHT_FILES)}")


def stray_files(folder: Path) -> list[str]:
    """Returns the names of files of weights in `folder` that `read_weights` does not read."""
    file = weights_file(folder)
    used = {file.name}
    if file.name.endswith(".index.json"):
        used |= set(json.loads(file.read_text())["weight_map"].values())
    return sorted(p.name for p in folder.iterdir() if p.name not in used and looks_like_weights(p.name))


def looks_like_weights(name: str) -> bool:
    """Returns whether a file of this name holds weights or lists files that do."""
    return name.endswith(SUFFIXES) or ".index" in name


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of one file, mapped into memory.

    Raises:
        ValueError: if it is missing, damaged, or a torch file that holds more than tensors and plain values.
    """
    if not path.is_file():
        raise ValueError(f"the file of weights {path} is missing")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Files older than torch 1.6 are no zip files and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or shards with an index if the tensors take more than `shard_bytes`, and checks them.

    Args:
        weights: none of which share memory with another.

    Raises:
        OSError: if what was written is not what was given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = split(weights, shard_bytes)
    names = shard_names(len(shards))
    for file, shard in zip(names, shards, strict=True):
        save_file({name: weights[name].contiguous() for name in shard}, folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=1))
    written = read_weights(folder)
    if damaged := [n for n, t in weights.items() if n not in written or not same(written[n], t)]:
        raise OSError(f"{folder} does not hold what was written to it: {listed(damaged)}")


def split(weights: Mapping[str, torch.Tensor], shard_bytes: int) -> list[list[str]]:
    """Returns the names of each shard, in order; a tensor larger than `shard_bytes` has one of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """Returns the file names of `count` shards."""
    if count == 1:
        return [SAFETENSORS]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether two tensors hold the same bits."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else a.equal(b)


def listed(names: Iterable[str], limit: int = 6) -> str:
    """Returns the first of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
