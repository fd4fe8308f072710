"""Weights sharded over ranks (stage 3): put there one by one, kept there between stages and in evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from eagle_train import dist
from eagle_train.model.generate import Access
from eagle_train.model.mixtures.base import Mixture
from eagle_train.model.token_mlp import TokenMlp
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.zero.config import init_config
from eagle_train.train.zero.join import import_deepspeed, join_deepspeed
from eagle_train.train.zero.serving import served_by_layer


class ShardedWeights:
    """Every rank has its part of every parameter; see `Placement`.

    A parameter is whole for a moment, on the device, while it is put in its place: rank 0's value is sent to the
    other ranks, of which each keeps its part. So neither a host nor a device ever holds the whole model.

    Args:
        device: where weights are computed with.
        dtype: of the parameters.
        on_host: the parts lie in host memory.
        pin_memory: which is page-locked.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, on_host: bool, pin_memory: bool) -> None:
        self.device = device
        self.dtype = dtype
        self.config = init_config(on_host=on_host, pin_memory=pin_memory)
        self.first: nn.Parameter | None = None
        self.masters: dict[nn.Parameter, torch.Tensor] = {}

    @property
    def counts(self) -> bool:
        """The other ranks get rank 0's values, so they need not read or draw any."""
        return dist.rank() == 0

    @torch.no_grad()
    def put(self, parameter: nn.Parameter, value: torch.Tensor | None) -> None:
        """Gives a parameter its place and its value, see `Placement`."""
        if (parameter.device.type, parameter.dtype) != (self.device.type, self.dtype):
            parameter.data = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
        if self.counts:
            parameter.copy_(torch.zeros(()) if value is None else value)
        if self.first is None:
            deepspeed = join_deepspeed()
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=self.config, dtype=self.dtype)
            self.first = parameter
        else:  # the same converter: a new one for every parameter would read the configuration again
            self.first.convert_to_zero_parameters([parameter])

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        """Returns this rank's part of a parameter, flat, with what fills it up to the length of every part."""
        return parameter.ds_tensor.detach() if is_sharded(parameter) else parameter.detach()

    def put_rest(self, model: nn.Module) -> None:
        """Puts in place what is not yet: the parameters of a module that a stage added, and buffers, whole."""
        for parameter in model.parameters():
            if not is_sharded(parameter):
                self.put(parameter, parameter.detach())
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)

    @torch.no_grad()
    def make_whole(self, model: nn.Module) -> None:
        """Replaces sharded parameters by whole ones on this rank's device; tied ones stay tied."""
        deepspeed = import_deepspeed()
        whole = {}
        for parameter in model.parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded(parameter)):
                data = parameter.detach().to(self.device, copy=True)
            whole[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
        for module in model.modules():
            module._parameters = {name: p if p is None else whole[id(p)] for name, p in module._parameters.items()}

    def serve(self, model: VisionLanguageModel) -> AbstractContextManager[Access]:
        """Lets a model generate layer by layer, see `served_by_layer`; a rank never holds much more than its part."""
        self.put_rest(model)
        return served_by_layer(model)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Returns whether each rank has a part of a parameter only."""
    import_deepspeed()
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    return is_zero_param(parameter)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Returns the shape of a parameter when it is whole."""
    return parameter.ds_shape if is_sharded(parameter) else parameter.shape


def gather_mixtures_at_once(model: nn.Module) -> list[RemovableHandle]:
    """Makes ranks gather all weights of a mixture, or of an MLP in tiles, when they call it.

    Ranks gather a module's weights together when they call it, so they must call the same modules in the same order.
    Within a mixture they do not: placeholders take another way through it than images; nor within an MLP that works in
    tiles, of which ranks have unlike numbers.

    Returns:
        Hooks to remove with the engine.
    """
    deepspeed = import_deepspeed()
    for module in model.modules():
        if isinstance(module, Mixture) or (isinstance(module, TokenMlp) and module.tile is not None):
            deepspeed.utils.set_z3_leaf_module(module, True)
    trained = [m for m in model.modules() if isinstance(m, Mixture) and any(p.requires_grad for p in m.parameters())]
    hooks = [(m.register_forward_pre_hook(with_gradient), m.register_forward_hook(through_inputs)) for m in trained]
    return [hook for pair in hooks for hook in pair]


def with_gradient(mixture: Mixture, inputs: tuple) -> tuple:
    """Returns a mixture's inputs, pixels that ask for a gradient.

    Its arrival tells DeepSpeed that the gradients of all weights of the mixture are there; pixels without it
    would tell so before the backward pass of the mixture has begun, and nothing would be learnt.
    """
    del mixture
    pixels, *grids = inputs
    return (pixels.float().requires_grad_(), *grids) if torch.is_grad_enabled() else inputs


def through_inputs(mixture: Mixture, inputs: tuple, features: torch.Tensor) -> torch.Tensor:
    """Returns features that depend on the pixels, also where frozen encoders do not hand gradients on."""
    del mixture
    pixels = inputs[0]
    return features + 0.0 * pixels.sum().to(features.dtype) if pixels.requires_grad else features
