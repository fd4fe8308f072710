"""Construction without weights: the initial values of large tensors are written down and computed when asked for."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIN_ELEMENTS = 1 << 20
"""Smaller tensors are made at once: norms, biases, tables of positions, toy models."""


@dataclass(slots=True)
class Recorded:
    """One operation that writes into a deferred tensor, or a view of it."""

    operation: torch._ops.OpOverload
    target: torch.Tensor
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    seed: int | None
    """Of the random numbers it draws."""


@dataclass(slots=True)
class Pending:
    """A tensor that has memory reserved but not touched, and what makes its values, in order."""

    whole: torch.Tensor
    operations: list[Recorded] = field(default_factory=list)


class DeferredInit(TorchDispatchMode):
    """Within it, modules are built as ever, but large tensors on the CPU stay without values.

    A tensor of `torch.empty` then has addresses but no memory until it is written. So everything that looks at a
    parameter sees a real CPU tensor (a meta tensor is not enough: torch and transformers leave out initializers
    there), while writes are recorded and carried out by `settle`: at any time, in any order, or never, where a
    pretrained tensor takes the place. Random numbers of each come from a seed of their own, drawn from torch's
    generator when it is built; therefore the values depend neither on which others are settled nor in which order.
    What does more with a deferred tensor than writing into it (a copy, a sum) settles it first.

    It reserves as many addresses as the model has bytes, which Linux grants unless vm.overcommit_memory is 2.

    Args:
        min_elements: tensors of fewer are made at once.
    """

    def __init__(self, min_elements: int = MIN_ELEMENTS) -> None:
        super().__init__()
        self.min_elements = min_elements
        self.pending: dict[int, Pending] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs an operation, or records it."""
        del types
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            made = func(*args, **kwargs)
            if made.device.type != "cpu" or made.numel() < max(self.min_elements, 1) or not made.is_contiguous():
                return made
            reserved = reserve(made.shape, made.dtype)
            self.pending[address(reserved)] = Pending(reserved)
            return reserved
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        deferred = [tensor for tensor in tensors if address(tensor) in self.pending]
        if not deferred or func.is_view:
            return func(*args, **kwargs)
        alone = len(deferred) == 1 and deferred[0] is args[0] and kwargs.get("generator") is None
        if alone and writes_first(func):
            self.record(func, args[0], args[1:], kwargs)
            return args[0]
        for tensor in deferred:
            self.settle(tensor)
        return func(*args, **kwargs)

    def record(self, func, target: torch.Tensor, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Writes down an operation on a deferred tensor."""
        random = torch.Tag.nondeterministic_seeded in func.tags
        seed = int(torch.randint(1 << 62, ())) if random else None
        pending = self.pending[address(target)]
        if func in OVERWRITES and target.numel() == pending.whole.numel():
            pending.operations.clear()  # whatever was there is gone
        pending.operations.append(Recorded(func, target.detach(), arguments, options, seed))

    @torch.no_grad()
    def settle(self, tensor: torch.Tensor) -> None:
        """Gives a tensor its initial values in its own memory, unless it has them."""
        pending = self.pending.pop(address(tensor), None)
        for one in pending.operations if pending else ():
            seeded = {} if one.seed is None else {"generator": torch.Generator().manual_seed(one.seed)}
            one.operation(one.target, *one.arguments, **(dict(one.options) | seeded))

    def forget(self, tensor: torch.Tensor) -> None:
        """Leaves a tensor without its initial values: others will be written into it."""
        self.pending.pop(address(tensor), None)


OVERWRITES = frozenset(
    {
        torch.ops.aten.uniform_.default,
        torch.ops.aten.normal_.default,
        torch.ops.aten.zero_.default,
        torch.ops.aten.fill_.Scalar,
        torch.ops.aten.copy_.default,
    }
)
"""Operations after which nothing is left of a tensor's earlier values."""


def reserve(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor on pages of its own, which take memory when they are written and give it back with the tensor.

    The allocator's would not: shards would come to lie between the holes that whole tensors leave.
    """
    pages = mmap.mmap(-1, shape.numel() * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def address(tensor: torch.Tensor) -> int:
    """Returns where a tensor's storage begins: the same for all views of it."""
    return 0 if tensor.device.type != "cpu" else tensor.untyped_storage().data_ptr()


def writes_first(func: torch._ops.OpOverload) -> bool:
    """Returns whether an operation writes into its first argument, and into no other."""
    written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    return written[0] and not any(written[1:])
