"""Files that are written once and can be checked later; tensors in the safetensors format, one at a time.

The safetensors library wants all tensors of a file at once; here each is asked for when it is its turn, so a file
takes no more memory than its largest tensor. Source of the format: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls the dtypes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write.

    Args:
        key: its name in the file.
        dtype, shape: of what `get` returns.
        get: returns it, on any device.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Returns its size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of a file that was written: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


class HashingFile:
    """Writes to a binary file and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Writes all of `data`; Python's lock is free meanwhile where `data` is large."""
        self.hash.update(data)
        self.file.write(data)
        self.size += len(data)


def write_bytes(path: Path, data: bytes) -> Written:
    """Writes a file and forces it onto the disk."""
    return _write(path, lambda file: file.write(data))


def write_tensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> Written:
    """Writes a safetensors file and forces it onto the disk.

    Args:
        metadata: goes into the file's header.

    Raises:
        ValueError: if a tensor is not what its entry says.
        OSError: if it cannot be written.
    """
    # Wide dtypes first: readers view the bytes where they lie, which must be aligned.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.key] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: HashingFile) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.get()
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, tuple(entry.shape)):
                raise ValueError(
                    f"{entry.key} is {tensor.dtype} {tuple(tensor.shape)}, announced as {entry.dtype} {entry.shape}"
                )
            if tensor.numel():
                file.write(raw(tensor))

    return _write(path, write)


def raw(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a tensor, in row-major order."""
    return memoryview(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy())


def _write(path: Path, write: Callable[[HashingFile], object]) -> Written:
    with path.open("wb") as plain:
        file = HashingFile(plain)
        write(file)
        plain.flush()
        os.fsync(plain.fileno())
    return Written(file.size, file.hash.hexdigest())


def hash_of_file(path: Path, chunk: int = 1 << 24) -> str:
    """Returns the SHA-256 of a file's content.

    Args:
        chunk: bytes read at once.
    """
    with path.open("rb", buffering=0) as file:
        found = hashlib.sha256()
        buffer = memoryview(bytearray(chunk))
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()


def sync(path: Path) -> None:
    """Forces a file or folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
