"""Attention of packed rows by the FlashAttention packages, 2 and 3, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from eagle_train.model.attention.backend import Segments
from eagle_train.model.attention.limits import KernelLimits, cast

Kernel = Callable[..., torch.Tensor | tuple]
"""`flash_attn_varlen_func` of either package."""


def flash_attention_2() -> FlashAttention:
    """Returns attention by the package `flash-attn`."""

    def load() -> Kernel:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func

    return FlashAttention("flash_attn", load, KernelLimits())


def flash_attention_3() -> FlashAttention:
    """Returns attention by FlashAttention 3, which is built from the `hopper` folder of flash-attn's repository.

    Its kernels are for Hopper alone (sm_90a): on Blackwell there is none to launch.
    """

    def load() -> Kernel:
        from flash_attn_interface import flash_attn_varlen_func

        return flash_attn_varlen_func

    return FlashAttention("flash_attn_interface", load, KernelLimits(capability=(9, 0), one_family=True))


class FlashAttention:
    """Calls a package's `flash_attn_varlen_func`, once for all samples of a row; heads may share keys and values.

    Args:
        package: that `load` imports, for messages.
        load: returns the function. It is called at the first use: configs are also read where nothing is installed.
        limits: of the kernel.
    """

    def __init__(self, package: str, load: Callable[[], Kernel], limits: KernelLimits) -> None:
        self.package = package
        self.limits = limits
        self._load = load

    def __str__(self) -> str:
        return self.package

    @cached_property
    def kernel(self) -> Kernel | ImportError:
        """The function, or why it could not be imported: a package built for another torch fails late, too."""
        try:
            return self._load()
        except ImportError as error:
            return error

    def refusal(self, query: torch.Tensor) -> str | None:
        """Returns why queries (T, heads, head_dim) cannot be computed, None where they can."""
        if reason := self.limits.refusal(query):
            return reason
        return f"{self.package} is not usable: {self.kernel}" if isinstance(self.kernel, ImportError) else None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        *,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        """Returns attention within each segment, (T, heads, head_dim); see `AttentionBackend`."""
        if reason := self.refusal(query):
            raise ValueError(f"{self.package} cannot run: {reason}; install it for this torch, or set attention=auto")
        ends, longest = segments.cu_seqlens, segments.max_length
        found = self.kernel(*cast(query, key, value), ends, ends, longest, longest, softmax_scale=scale, causal=causal)
        return found[0] if isinstance(found, tuple) else found  # early releases of version 3 add the log-sum-exp
