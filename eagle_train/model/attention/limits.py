"""What the fused kernels can compute, asked before they are called."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class KernelLimits:
    """Where a kernel runs; the defaults are those of the FlashAttention 2 kernels, torch's own and the package's.

    Args:
        device_type: `cuda`, `cpu`.
        dtypes: of queries, keys and values.
        capability: least compute capability of a GPU, (major, minor).
        one_family: whether the kernel runs on GPUs of that major number alone, being compiled for what only they have.
        head_dims: head dimensions are multiples of the first number, at most the second.

    Source: pytorch, `aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`.
    """

    device_type: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    capability: tuple[int, int] = (8, 0)
    one_family: bool = False
    head_dims: tuple[int, int] = (8, 256)

    def refusal(self, query: torch.Tensor) -> str | None:
        """Returns why queries (T, heads, head_dim) cannot be computed, None where they can."""
        device, dtype, head_dim = query.device, computed_dtype(query), query.shape[-1]
        if device.type != self.device_type:
            return f"it runs on {self.device_type}, not on {device.type}"
        found = torch.cuda.get_device_capability(device) if device.type == "cuda" else self.capability
        if found < self.capability or (self.one_family and found[0] > self.capability[0]):
            needed = f"{self.capability[0]}.x" if self.one_family else dotted(self.capability)
            return f"it needs compute capability {needed}, and this GPU has {dotted(found)}"
        if dtype not in self.dtypes:
            return f"it computes in {' or '.join(map(name_of, self.dtypes))}, not in {name_of(dtype)}"
        multiple, largest = self.head_dims
        if head_dim % multiple or head_dim > largest:
            return f"it needs a head_dim of at most {largest} and a multiple of {multiple}, not {head_dim}"
        return None


def computed_dtype(query: torch.Tensor) -> torch.dtype:
    """Returns the dtype attention is computed in: autocast's where it is on, else that of `query`."""
    kind = query.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # meta tensors, whose FLOPs are counted, have none
    return torch.get_autocast_dtype(kind) if autocast else query.dtype


def cast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Returns queries, keys and values in the dtype that attention is computed in.

    Under autocast rotary positions leave queries and keys in float32, and values in bfloat16; torch casts them for
    its own attention, but not for other kernels.
    """
    dtype = computed_dtype(tensors[0])
    return [tensor.to(dtype) for tensor in tensors]


def dotted(capability: tuple[int, int]) -> str:
    """Returns a compute capability as it is written, for example `8.0`."""
    return ".".join(map(str, capability))


def name_of(dtype: torch.dtype) -> str:
    """Returns a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")
