"""How much memory a row takes between pixels and gradients, told on the meta device without a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from eagle_train.types import PackedBatch


def activation_bytes(model: nn.Module, row: PackedBatch) -> int:
    """Returns the bytes at the peak of a forward and backward pass, without parameters and their gradients.

    A gradient of a parameter counts while it is made, then no more: an engine reduces or adds it elsewhere. What a
    kernel takes for itself and what an allocator loses are not seen.

    Args:
        model: on the meta device.
        row: see `meta_row`; counts too.
    """
    hooks = [p.register_post_accumulate_grad_hook(forget_gradient) for p in model.parameters() if p.requires_grad]
    with GpuKernels(), LiveBytes("meta", known=[*model.parameters(), *model.buffers()]) as live:
        loss = model(row).sum()
        # `loss.backward()` and `torch.autograd.backward` are functions of torch too: while they run, `GpuKernels` would
        # be suspended, and layers would be recomputed with other kernels than they were run with. Entered in a hook of
        # the loss, it would last for that hook. So there is no public way, as of torch 2.15.
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
    for hook in hooks:
        hook.remove()
    values = (getattr(row, field.name) for field in fields(row))
    return live.peak + sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def meta_row(
    num_tokens: int,
    *,
    num_tiles: int,
    num_targets: int,
    tokens_per_tile: int,
    tile_size: int,
    example: Callable[[int, int], Mapping[str, Any]] | None = None,
) -> PackedBatch:
    """Returns a row of one sample, on the meta device but for its lengths.

    Args:
        num_tokens: T.
        num_tiles: N; with none, the row has the placeholder tile.
        num_targets: positions with a label.
        tokens_per_tile: visual tokens of a tile.
        tile_size: S in pixels.
        example: a mixture's: S and N -> its pixels and, of native resolution, their grids; None: flat tiles.

    Raises:
        ValueError: if the tiles have more tokens than the row.
    """
    num_visual = num_tiles * tokens_per_tile
    if num_visual > num_tokens:
        raise ValueError(f"{num_tiles} tiles of {tokens_per_tile} tokens do not fit into a row of {num_tokens}")
    numbers = partial(torch.empty, device="meta", dtype=torch.int64)
    tiles = max(num_tiles, 1)
    flat = {"pixels": torch.empty(tiles, 3, tile_size, tile_size, device="meta", dtype=torch.uint8)}
    seen = flat if example is None else example(tile_size, tiles)
    return PackedBatch(
        input_ids=numbers(num_tokens),
        labels=numbers(num_tokens),
        loss_weights=torch.empty(num_tokens, device="meta"),
        position_ids=numbers(num_tokens),
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
        max_seqlen=num_tokens,
        segment_lengths=(num_tokens,),
        image_positions=numbers(num_visual),
        **seen,
        num_images=num_tiles,
        num_tokens=num_tokens,
        num_targets=num_targets,
        keys=("meta",),
        sources=("meta",),
    )


def forget_gradient(parameter: nn.Parameter) -> None:
    """Clears the gradient of a parameter."""
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make under it, each storage once, for as long as it lives.

    Args:
        device: kind of device whose tensors count: `cpu`, `meta`, ...
        known: tensors that do not count, nor views of them.
    """

    def __init__(self, device: str, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.device = device
        self.known = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        self.now = 0
        """Bytes that are alive."""
        self.peak = 0
        """The most that were alive at once."""
        self.storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs an operation and notes what it made."""
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage until it is freed."""
        key, num_bytes = id(storage), storage.nbytes()
        if key in self.storages or key in self.known:
            return
        self.storages[key] = weakref.ref(storage, lambda _: self.forget(key, num_bytes))
        self.now += num_bytes
        self.peak = max(self.peak, self.now)

    def forget(self, key: int, num_bytes: int) -> None:
        """Counts a storage no more."""
        del self.storages[key]
        self.now -= num_bytes


class GpuKernels(TorchFunctionMode):
    """Lets meta tensors take the memory that a GPU's kernels take.

    Attention of meta tensors would be composed of matrices (T, T), which no GPU holds.
    """

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs a function of torch, or what stands for it."""
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return fused_attention(*args, **kwargs)
        return function(*args, **kwargs)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Returns what `F.scaled_dot_product_attention` gives, by the kernel that keeps one number per query.

    FlashAttention, which has no mask, takes keys and values of fewer heads as they are.
    """
    if enable_gqa and attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
