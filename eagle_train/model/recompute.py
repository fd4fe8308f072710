"""Activation checkpointing: what the backward pass computes anew, and what waits for it in host memory."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel


def recompute_layers(model: PreTrainedModel) -> None:
    """Makes `model` recompute each layer's activations in the backward pass instead of keeping them."""
    # transformers 5.23 renamed it and warns about the old name, the only one that 5.17 has.
    old_name = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})


def saved_on_host(device: torch.device, *, min_bytes: int = 1 << 20) -> saved_tensors_hooks:
    """Returns a context in which what autograd keeps for the backward pass waits in host memory.

    Around checkpointed layers these are the layers' inputs. Copies run beside the computation: each layer's
    input leaves while the layer runs, and comes back while the layer after it goes backward.

    Args:
        device: where the tensors are; on a CPU they are copied all the same, but nothing is gained.
        min_bytes: smaller tensors stay where they are.
    """
    store = HostStore(device, min_bytes)
    return saved_tensors_hooks(store.leave, store.come_back)


@dataclass(eq=False)
class Waiting:
    """A tensor in host memory."""

    place: int
    """Its number in the order in which tensors left."""
    host: torch.Tensor
    """Page-locked where it came from a GPU."""
    returned: torch.Tensor | None = None
    """Its copy on the device, from when it is begun to when it is used."""
    used: bool = False
    """Whether it has come back: nodes with several saved tensors ask for them in the order in which they left."""


class HostStore:
    """The saved tensors of one forward pass, in host memory; parameters stay where they are.

    Args:
        device, min_bytes: see `saved_on_host`.
    """

    def __init__(self, device: torch.device, min_bytes: int) -> None:
        self.device = device
        self.min_bytes = min_bytes
        self.cuda = device.type == "cuda"
        # torch.cpu has the same functions, whose streams and events do nothing.
        self.module = torch.get_device_module("cuda" if self.cuda else "cpu")
        self.copies = self.module.Stream()
        self.waiting: list[Waiting] = []
        self.leaving: deque[tuple[torch.Tensor, torch.Event]] = deque()

    def leave(self, tensor: torch.Tensor) -> Waiting | torch.Tensor:
        """Returns what autograd keeps instead of `tensor`; its copy to the host has been begun."""
        if isinstance(tensor, nn.Parameter) or tensor.nbytes < self.min_bytes:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.cuda)
        done = self.copy(host, tensor)
        # The tensor is held until it is copied. Two at a time: were it left to the allocator (`record_stream`),
        # a CPU that runs ahead of the GPU would find no freed memory and take more and more.
        self.leaving.append((tensor, done))
        self.let_go(keep=1)
        self.waiting.append(Waiting(len(self.waiting), host))
        return self.waiting[-1]

    def come_back(self, kept: Waiting | torch.Tensor) -> torch.Tensor:
        """Returns the tensor on its device, and begins to fetch the one that left before it."""
        if isinstance(kept, torch.Tensor):
            return kept
        self.let_go(keep=0)
        tensor = self.fetch(kept)
        self.module.current_stream().wait_stream(self.copies)
        kept.returned, kept.used = None, True
        if kept.place > 0 and not self.waiting[kept.place - 1].used:
            self.fetch(self.waiting[kept.place - 1])
        return tensor

    def fetch(self, kept: Waiting) -> torch.Tensor:
        """Returns a tensor's copy on the device, begun unless it was before; wait for the copies before using it."""
        if kept.returned is None:
            kept.returned = torch.empty_like(kept.host, device=self.device)
            self.copy(kept.returned, kept.host)
        return kept.returned

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> torch.Event:
        """Copies beside the computation, after all that was asked of it so far; returns what tells the end."""
        self.copies.wait_stream(self.module.current_stream())
        with self.module.stream(self.copies) if self.cuda else nullcontext():
            if self.device.type != "meta":  # meta tensors hold nothing; they are here to be counted
                to.copy_(source, non_blocking=True)
            return self.copies.record_event()

    def let_go(self, *, keep: int) -> None:
        """Forgets tensors that have left, but for the last `keep`; computation waits for their copies to end."""
        while len(self.leaving) > keep:
            _, done = self.leaving.popleft()
            self.module.current_stream().wait_event(done)
