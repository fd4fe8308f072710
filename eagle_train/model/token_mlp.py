"""The MLPs of an LLM over tiles of tokens, or over those that matter: MLPs treat every token by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

ATTENTION, MLP = "self_attn", "mlp"
"""Names of attention and MLP in the layers of transformers' families."""


class TokenMlp(nn.Module):
    """An MLP, (..., H) -> (..., H), that can pass over tokens and work on `tile` of those that remain at a time.

    In tiles it keeps no more than its input. In the backward pass each tile is computed anew, and gradients of weights
    are summed over tiles in float32; they arrive once, so that no engine has to know. It stands where the MLP stood and
    has the same children under the same names. Ranks may have unlike numbers of tiles: under ZeRO-3 its weights are to
    be gathered for all of them at once.

    Args:
        mlp: treats every token alike and by itself, with nothing random.
        tile: tokens; None: all at once.

    Source: ALST (arXiv 2506.13996), sequence tiling.
    """

    def __init__(self, mlp: nn.Module, tile: int | None = None) -> None:
        super().__init__()
        self._modules = mlp._modules  # the same, not a copy: what takes a child's place takes it in both
        self.whole = (mlp,)  # in a tuple, so that it is no child
        self.tile = tile
        self.wanted: torch.Tensor | None = None
        """(P,) int64, the tokens whose results somebody uses; of others it returns zeros. None: all."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the MLP of every token that is wanted."""
        if self.wanted is None:
            return self.of(hidden)
        tokens = hidden.flatten(0, -2)
        found = self.of(tokens.index_select(0, self.wanted)[None])[0]
        return found.new_zeros(tokens.shape).index_copy(0, self.wanted, found).view_as(hidden)

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the MLP of all tokens it is given, (..., H)."""
        (mlp,) = self.whole
        tokens = hidden.flatten(0, -2)
        if self.tile is None or len(tokens) <= self.tile:
            return mlp(hidden)
        return TokenTiles.apply(tokens, mlp, self.tile, *mlp.parameters()).view_as(hidden)


class TokenTiles(torch.autograd.Function):
    """`module(tokens)`, tile by tile in both passes."""

    @staticmethod
    def forward(
        ctx, tokens: torch.Tensor, module: Callable[[torch.Tensor], torch.Tensor], tile: int, *weights: torch.Tensor
    ) -> torch.Tensor:
        """Returns (T, H) of tokens (T, H).

        Args:
            weights: all parameters of the module: the gradients of those that ask for one are returned.
        """
        ctx.save_for_backward(tokens, *weights)
        ctx.module, ctx.tile, ctx.casts = module, tile, casts_of_now(tokens.device)
        pieces = tokens.split(tile)
        with ctx.casts():
            first = module(pieces[0])
            out = first.new_empty(len(tokens), first.shape[1])
            for into, piece in zip(out.split(tile), pieces, strict=True):
                into.copy_(first if piece is pieces[0] else module(piece))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of tokens and weights."""
        tokens, *weights = ctx.saved_tensors
        asked = ctx.needs_input_grad[0]
        trained = [weight for weight, wanted in zip(weights, ctx.needs_input_grad[3:], strict=True) if wanted]
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in trained]
        into = torch.empty_like(tokens) if asked else None
        for begin in range(0, len(tokens), ctx.tile):
            some = slice(begin, begin + ctx.tile)
            piece = tokens[some].detach().requires_grad_(asked)
            with torch.enable_grad(), ctx.casts():
                out = ctx.module(piece)
            found = torch.autograd.grad(out, [piece, *trained] if asked else trained, gradient[some])
            if asked:
                into[some] = found[0]
            for total, more in zip(sums, found[asked:], strict=True):
                total += more
        given = iter(total.to(weight.dtype) for total, weight in zip(sums, trained, strict=True))
        return into, None, None, *(next(given) if wanted else None for wanted in ctx.needs_input_grad[3:])


def casts_of_now(device: torch.device) -> Callable[[], AbstractContextManager]:
    """Returns what enters autocast as it is now, or none; without its cache, which would keep graphs of other tiles."""
    kind = "cpu" if device.type == "meta" else device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return lambda: torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


def tile_mlps(llm: PreTrainedModel, tile: int | None) -> None:
    """Makes the MLPs of an LLM's layers work on `tile` tokens at a time; None: on all of a row, as they were made.

    Raises:
        ValueError: if `tile` is below 1, no module of the LLM is an MLP by its name, or one is random.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"an MLP works on at least 1 token at a time, not {tile}; set engine.mlp_tile=null or more")
    found = [module for module in llm.modules() if MLP in dict(module.named_children())]
    if tile is not None and not found:
        raise ValueError(f"no layer of {llm.config.model_type} has an {MLP!r}; set engine.mlp_tile=null")
    for layer in found:
        if tile is not None and is_random(layer.get_submodule(MLP)):
            raise ValueError("an MLP with dropout would not be computed anew as it was; set engine.mlp_tile=null")
        by_token(layer).tile = tile


def pass_over_unwanted(llm: PreTrainedModel) -> None:
    """Makes the last layer's MLP pass over tokens that are not `wanted`, where the layer is told of any.

    No other token sees what that MLP makes of one, and of what it makes of a token without a label there is no use: so
    losses and gradients stay what they are. Does nothing to an LLM without `last_parts`.
    """
    if parts := last_parts(llm):
        # The layer's own hooks do not run when it is recomputed (transformers 5.23); those of its parts do.
        mlp = by_token(llm.model.layers[-1])
        parts[ATTENTION].register_forward_pre_hook(partial(tell_wanted, mlp), with_kwargs=True)


def last_parts(llm: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns attention and MLP of the last layer; empty if it has none by these names, or its MLP is random."""
    layers = getattr(llm.model, "layers", None)
    parts = dict(layers[-1].named_children()) if layers else {}
    if not {ATTENTION, MLP} <= parts.keys() or is_random(parts[MLP]):
        return {}
    return {name: parts[name] for name in (ATTENTION, MLP)}


def tell_wanted(mlp: TokenMlp, attention: nn.Module, inputs: tuple, arguments: Mapping[str, Any]) -> None:
    """Hands `wanted`, which a layer's attention gets among its arguments, to the MLP that comes after it."""
    del attention, inputs
    mlp.wanted = arguments.get("wanted")


def by_token(layer: nn.Module) -> TokenMlp:
    """Returns a layer's MLP, made a `TokenMlp` unless it is one."""
    if not isinstance(layer.get_submodule(MLP), TokenMlp):
        setattr(layer, MLP, TokenMlp(layer.get_submodule(MLP)))
    return layer.get_submodule(MLP)


def is_random(mlp: nn.Module) -> bool:
    """Returns whether an MLP drops anything at random."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in mlp.modules())
