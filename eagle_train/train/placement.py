"""Where the weights of a run lie, from its start through its stages; and how a model gets there, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

from eagle_train.model.generate import WHOLE, Access
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.deferred import MIN_ELEMENTS, DeferredInit


class Placement(Protocol):
    """Puts weights where an engine wants them, and tells what this rank has of them."""

    masters: dict[nn.Parameter, torch.Tensor]
    """What an engine leaves for the next stage's besides the weights: this rank's share of float32 masters."""

    @property
    def counts(self) -> bool:
        """Whether the values that this rank gives to `put` count; all ranks give the same ones in any case."""

    def put(self, parameter: nn.Parameter, value: torch.Tensor | None) -> None:
        """Gives a parameter its place and its value; all ranks call it for the same parameters in the same order.

        Args:
            value: of the parameter's shape, any dtype, for example mapped from a file; None: zeros.
        """

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        """Returns what this rank has of a parameter's values: all, or its shard, flat."""

    def put_rest(self, model: nn.Module) -> None:
        """Puts in place what is not yet: parameters that a stage added, and buffers, which are whole everywhere."""

    def make_whole(self, model: nn.Module) -> None:
        """Leaves every weight whole on this rank's device, for use outside an engine; all ranks call it."""

    def serve(self, model: VisionLanguageModel) -> AbstractContextManager[Access]:
        """Lets a model generate outside an engine with its weights where they are; all ranks call it."""


class WholeWeights:
    """Every rank has all weights.

    Args:
        device: where they lie.
        dtype: of the parameters.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.masters: dict[nn.Parameter, torch.Tensor] = {}

    @property
    def counts(self) -> bool:
        """Every rank uses its own values."""
        return True

    @torch.no_grad()
    def put(self, parameter: nn.Parameter, value: torch.Tensor | None) -> None:
        """Gives a parameter its place and its value, see `Placement`."""
        if not self.holds(parameter):
            parameter.data = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
        parameter.copy_(torch.zeros(()) if value is None else value)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Returns whether a parameter is in its place."""
        return (parameter.device.type, parameter.dtype) == (self.device.type, self.dtype)

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        """Returns all of a parameter's values."""
        return parameter.detach()

    def put_rest(self, model: nn.Module) -> None:
        """Puts in place what is not yet; buffers keep their dtype: positions are too large for bfloat16."""
        for parameter in model.parameters():
            if not self.holds(parameter):
                self.put(parameter, parameter.detach())
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)

    def make_whole(self, model: nn.Module) -> None:
        """All of it is whole already; what a stage added is put in place."""
        self.put_rest(model)

    def serve(self, model: VisionLanguageModel) -> AbstractContextManager[Access]:
        """Returns a context in which every rank uses its own weights."""
        self.put_rest(model)
        return nullcontext(WHOLE)


class Construction:
    """A model under construction: built without values, which then come one tensor at a time.

    So the host never holds the whole model, if its `placement` does not.

    Args:
        build: makes the model on the CPU.
        placement: where its weights go.
        min_elements: see `DeferredInit`.
    """

    def __init__(
        self, build: Callable[[], nn.Module], placement: Placement, *, min_elements: int = MIN_ELEMENTS
    ) -> None:
        self.placement = placement
        self.deferred = DeferredInit(min_elements)
        with self.deferred:
            self.model = build()
        self.placed: set[int] = set()

    @torch.no_grad()
    def put(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Gives a parameter or buffer of the model a value, for example a pretrained one, not its initial one."""
        self.deferred.forget(tensor)
        if isinstance(tensor, nn.Parameter):
            self.placement.put(tensor, value)
            self.placed.add(id(tensor))
        else:
            tensor.copy_(value)

    @property
    def counts(self) -> bool:
        """Whether the values that this rank gives to `put` count, see `Placement`."""
        return self.placement.counts

    def finish(self, *, initial: bool = True) -> nn.Module:
        """Returns the model, on this rank's device; what was not `put` has its initial values.

        Args:
            initial: if false, these parameters are zero: a checkpoint will be loaded into all of them.
        """
        for parameter in self.model.parameters():
            if id(parameter) in self.placed:
                continue
            if initial and self.placement.counts:
                self.deferred.settle(parameter)
            self.deferred.forget(parameter)
            self.placement.put(parameter, parameter.detach() if initial else None)
        for buffer in self.model.buffers():
            self.deferred.settle(buffer)
        self.deferred.pending.clear()
        self.placement.put_rest(self.model)
        return self.model
