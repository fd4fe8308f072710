"""The engine protocol, and the plain torch engine: replicated weights, summed gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed
from torch import nn

from eagle_train import dist
from eagle_train.model.token_mlp import tile_mlps
from eagle_train.train.optim import adamw, set_learning_rates
from eagle_train.train.pieces import Piece, load_replicated, replicated_pieces, saved_tensors, write_pieces
from eagle_train.train.placement import Placement, WholeWeights
from eagle_train.train.schedule import Stage
from eagle_train.train.sequence.spread import Spread
from eagle_train.types import PackedBatch


class Engine(Protocol):
    """Owns precision, sharding, gradients and the optimizer.

    The gradient of a step is the SUM over ranks and micro-batches of what `backward` is given, so the
    trainer alone decides the normalization.
    """

    device: torch.device
    model: nn.Module
    bf16: bool
    """Whether layers compute in bfloat16."""
    placement: Placement

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of a scalar; `last` marks the last micro-batch of the step."""

    def step(self, lr_scale: float, *, discard: bool = False) -> tuple[Mapping[str, float], float]:
        """Clips, updates, clears the gradients; returns learning rates by group and the gradient norm.

        With a norm that is not finite, or to `discard` the gradients, nothing is updated: no weight, no moment of
        the optimizer, no count of its steps.
        """

    def pieces(self) -> Iterator[Piece]:
        """Yields this rank's share of weights and optimizer state, as views of what is in use; see `train.pieces`."""

    def save(self, folder: Path) -> None:
        """Writes the pieces into `folder`; every rank calls it."""

    def load(self, folder: Path) -> None:
        """Restores what any engine wrote on any number of ranks; learning rates and the like stay the stage's.

        Raises:
            ValueError: if the checkpoint does not fit the model, or what the stage trains of it.
        """

    def close(self) -> None:
        """Releases what the engine holds besides the model, whose weights stay current, where `placement` has them."""


class PlainEngine:
    """Plain torch: every rank holds everything; gradients are summed over ranks.

    Args:
        model, stage: what is trained and how.
        micro_batches: per step and rank; not needed here.
        placement: where the model's weights lie; null: made for it.
        bf16: compute in bfloat16 over float32 weights; null: where there is a GPU.
        activation_checkpointing: recompute activations in the backward pass.
        activation_offload: with it, the inputs of the LLM's layers wait in host memory.
        mlp_tile: tokens that the LLM's MLPs work on at a time, see `TokenMlp`; null: all of a row.
        sequence_parallel: ranks that share each row, see `Spread`.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        micro_batches: int,
        *,
        placement: Placement | None = None,
        bf16: bool | None = None,
        activation_checkpointing: bool = False,
        activation_offload: bool = False,
        mlp_tile: int | None = None,
        sequence_parallel: int = 1,
    ) -> None:
        del micro_batches
        self.device = dist.device()
        self.model = model
        self.placement = placement or self.weights()
        self.placement.put_rest(model)
        self.stage = stage
        self.bf16 = self.device.type == "cuda" if bf16 is None else bf16
        spare_activations(model, activation_checkpointing, activation_offload, mlp_tile)
        self.spread = Spread(model, sequence_parallel)
        self.optimizer = adamw(model, stage)

    @staticmethod
    def weights(**fields: object) -> Placement:
        """Returns where the weights of a run lie, from its start on: whole and float32 on every rank."""
        del fields
        return WholeWeights(dist.device(), torch.float32)

    @staticmethod
    def state_bytes(total: int, trainable: int, ranks: int, **fields: object) -> dict[str, int]:
        """Returns bytes per rank of weights, gradients and optimizer state, all float32.

        Args:
            total, trainable: numbers of parameters.
        """
        del ranks, fields
        return {"parameters": 4 * total, "gradients": 4 * trainable, "optimizer": 8 * trainable}

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`; after the last micro-batch, sums gradients over ranks."""
        loss.backward()
        if last and dist.world_size() > 1:
            for parameter in self._trained():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)

    def step(self, lr_scale: float, *, discard: bool = False) -> tuple[Mapping[str, float], float]:
        """Clips, updates and clears; returns learning rates and the gradient norm before clipping."""
        limit = self.stage.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self._trained(), float("inf") if limit is None else limit)
        rates = set_learning_rates(self.optimizer, lr_scale)
        if torch.isfinite(norm) and not discard:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return rates, float(norm)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def pieces(self) -> Iterator[Piece]:
        """Yields this rank's share of weights and optimizer state, which are the same on every rank."""
        return replicated_pieces(saved_tensors(self.model), self.optimizer.state)

    def save(self, folder: Path) -> None:
        """Every rank writes its share."""
        write_pieces(folder, list(self.pieces()))

    def load(self, folder: Path) -> None:
        """Restores weights and optimizer state, whichever engine wrote them."""
        load_replicated(folder, self.model, self.optimizer)

    def close(self) -> None:
        """Leaves the group that shares rows."""
        self.spread.leave()


def spare_activations(model: nn.Module, checkpointing: bool, offload: bool, mlp_tile: int | None = None) -> None:
    """Makes a model recompute its activations, keep in host memory what that starts from, and tile MLPs, if so asked.

    Raises:
        ValueError: for offload alone: host memory would have to take every activation.
    """
    if offload and not checkpointing:
        raise ValueError(
            "engine.activation_offload needs engine.activation_checkpointing=true: it keeps the inputs of "
            "checkpointed layers in host memory"
        )
    if checkpointing:
        model.set_activation_checkpointing(offload=offload)
    if mlp_tile is not None:
        tile_mlps(model.llm, mlp_tile)
