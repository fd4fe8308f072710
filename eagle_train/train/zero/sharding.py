"""Weights sharded over ranks (stage 3), and made whole again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from eagle_train import dist
from eagle_train.model.mixtures.base import Mixture
from eagle_train.train.zero.join import import_deepspeed


def shard(model: nn.Module, config: Mapping, dtype: torch.dtype) -> list[RemovableHandle]:
    """Leaves this rank its part of every parameter, in `dtype` on its device; buffers stay whole.

    Parameters move one by one, so that the device never holds the whole model. Ranks gather a module's weights
    together when they call it, so they must call the same modules in the same order. Within a mixture they need
    not: its weights are gathered at once, since placeholders take another way through it than images.

    Returns:
        Hooks to remove with the engine.
    """
    deepspeed = import_deepspeed()
    deepspeed.utils.set_z3_leaf_modules(model, [Mixture])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(dist.device())
    deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=dtype)
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


def unshard(model: nn.Module) -> None:
    """Replaces sharded parameters by whole ones in host memory; tied ones stay tied. All ranks call it."""
    deepspeed = import_deepspeed()
    whole = {}
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            data = parameter.detach().to("cpu", copy=True)
        whole[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for module in model.modules():
        module._parameters = {name: p if p is None else whole[id(p)] for name, p in module._parameters.items()}
