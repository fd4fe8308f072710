"""float32 master weights between two stages, of a run in bfloat16."""

from __future__ import annotations

import torch
from torch import nn

from eagle_train import dist
from eagle_train.train.zero.join import import_deepspeed
from eagle_train.train.zero.sharding import is_sharded


def keep_masters(model: nn.Module, kept: dict[nn.Parameter, torch.Tensor]) -> None:
    """Takes the master weights of the trained parameters before their optimizer goes; all ranks call it.

    Without them every change of stage would round what was learnt to bfloat16.

    Args:
        kept: gets, by parameter, this rank's share, flat float32, in host memory.
    """
    utils = import_deepspeed().utils
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if is_sharded(parameter):
            share = utils.safe_get_local_fp32_param(parameter)
        else:  # optimizers split their parameters each in its own way, so these shares are ours
            share = own_share(utils.safe_get_full_fp32_param(parameter).flatten())
        kept[parameter] = share.detach().to("cpu", copy=True)


def give_masters(model: nn.Module, kept: dict[nn.Parameter, torch.Tensor]) -> None:
    """Gives master weights to the engine that now trains the model, and forgets those that it does not train.

    A checkpoint of its stage will not hold the others, and a run that resumes from it must go on as one that was
    never stopped.

    Args:
        kept: see `keep_masters`; empty afterwards.
    """
    utils = import_deepspeed().utils
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter not in kept:
            continue
        share = kept[parameter].to(dist.device())
        if is_sharded(parameter):
            utils.safe_set_local_fp32_param(parameter, share)
        else:
            whole = joined(share)[: parameter.numel()].view(parameter.shape)
            utils.safe_set_full_fp32_param(parameter, whole)
    kept.clear()


def own_share(whole: torch.Tensor) -> torch.Tensor:
    """Returns this rank's share of a flat tensor, zeros at the end of the last one: all are of one length."""
    length = -(-len(whole) // dist.world_size())
    share = whole.new_zeros(length)
    mine = whole[dist.rank() * length : (dist.rank() + 1) * length]
    share[: len(mine)] = mine
    return share


def joined(share: torch.Tensor) -> torch.Tensor:
    """Returns the shares of all ranks, one behind the other."""
    if dist.world_size() == 1:
        return share
    whole = share.new_empty(len(share) * dist.world_size())
    torch.distributed.all_gather_into_tensor(whole, share)
    return whole
