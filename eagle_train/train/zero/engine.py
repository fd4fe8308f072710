"""The engine that runs ZeRO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from eagle_train import dist
from eagle_train.train.engine import spare_activations
from eagle_train.train.optim import adamw, set_learning_rates
from eagle_train.train.schedule import Stage
from eagle_train.train.zero.checkpoints import load_shards, save_shards
from eagle_train.train.zero.config import zero_config
from eagle_train.train.zero.join import join_deepspeed
from eagle_train.train.zero.sharding import shard, unshard
from eagle_train.types import PackedBatch


class ZeroEngine:
    """ZeRO: optimizer states (stage 1), gradients (2) and weights (3) sharded over ranks.

    Args:
        model, stage: what is trained and how.
        micro_batches: per step and rank, before one update.
        zero_stage: 1, 2 or 3.
        bf16: bfloat16 weights with float32 master weights; null: where there is a GPU.
        activation_checkpointing, activation_offload: see `PlainEngine`.
        overlap_comm: reduce gradients while the backward pass still runs.
        reduce_bucket_size: elements reduced at once.
        persistence_threshold: stage 3 leaves weights of at most so many elements whole on every rank.
        prefetch_bucket_size: elements that stage 3 gathers ahead of their use.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        micro_batches: int,
        *,
        zero_stage: int = 2,
        bf16: bool | None = None,
        activation_checkpointing: bool = False,
        activation_offload: bool = False,
        overlap_comm: bool = False,
        reduce_bucket_size: int = 500_000_000,
        persistence_threshold: int = 100_000,
        prefetch_bucket_size: int = 50_000_000,
    ) -> None:
        if zero_stage not in (1, 2, 3):
            raise ValueError(f"there is no zero_stage {zero_stage}; use 1, 2 or 3")
        self.device = dist.device()
        self.model = model
        self.sharded = zero_stage == 3
        self.bf16 = bf16 = self.device.type == "cuda" if bf16 is None else bf16
        spare_activations(model, activation_checkpointing, activation_offload)
        config = zero_config(
            zero_stage=zero_stage,
            bf16=bf16,
            micro_batches=micro_batches,
            max_grad_norm=stage.max_grad_norm,
            overlap_comm=overlap_comm,
            reduce_bucket_size=reduce_bucket_size,
            persistence_threshold=persistence_threshold,
            prefetch_bucket_size=prefetch_bucket_size,
        )
        deepspeed = join_deepspeed()
        optimizer = adamw(model, stage)  # before the weights are sharded: groups depend on their shapes
        self.own_attributes = {module: set(vars(module)) for module in model.modules()}
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.hooks = shard(model, config, dtype) if self.sharded else []
        if not self.sharded:
            model.to(self.device, dtype)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )

    @staticmethod
    def state_bytes(
        total: int, trainable: int, ranks: int, *, zero_stage: int, bf16: bool | None, **fields: object
    ) -> dict[str, int]:
        """Returns bytes per rank of weights, gradients and optimizer state.

        bfloat16 weights have a float32 master copy, which counts as optimizer state; `bf16` null is
        taken for a GPU's choice, true.

        Args:
            total, trainable: numbers of parameters.
            ranks: over which optimizer state, gradients (from stage 2) and weights (stage 3) are sharded.
        """
        del fields
        width = 4 if bf16 is False else 2
        shared = -(-trainable // ranks)
        return {
            "parameters": width * (-(-total // ranks) if zero_stage == 3 else total),
            "gradients": 4 * (trainable if zero_stage == 1 else shared),
            "optimizer": (8 if bf16 is False else 12) * shared,
        }

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32."""
        return self.engine(batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`. DeepSpeed averages over ranks: undone, since ours is a sum."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * dist.world_size(), scale_wrt_gas=False)

    def step(self, lr_scale: float) -> tuple[Mapping[str, float], float]:
        """Clips, updates and clears; returns learning rates and the gradient norm before clipping."""
        rates = set_learning_rates(self.optimizer, lr_scale)
        self.engine.step()
        return rates, float(self.engine.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        """Every rank writes its shards; `latest` is ours to publish, never DeepSpeed's."""
        save_shards(self.engine, folder)

    def load(self, folder: Path) -> None:
        """Restores this rank's shards.

        Raises:
            ValueError: if the checkpoint was written by another number of ranks or another engine.
        """
        load_shards(self.engine, self.optimizer, folder, sharded=self.sharded)

    def close(self) -> None:
        """Leaves the model as plain torch has it: whole, without DeepSpeed's hooks and attributes.

        Under bf16 the model keeps bfloat16 weights: the float32 masters of a finished stage are not carried
        over to the next. Weights that were sharded are then whole in host memory, on every rank.
        """
        for hook in (self.engine.module_forward_pre_hook, self.engine.module_forward_post_hook, *self.hooks):
            hook.remove()
        if self.sharded:
            self.engine.empty_partition_cache()
        self.engine.destroy()
        del self.engine, self.optimizer
        if self.sharded:
            unshard(self.model)
            for module, own in self.own_attributes.items():  # the next engine would take them for its own
                for name in set(vars(module)) - own:
                    delattr(module, name)
