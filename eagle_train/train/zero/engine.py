"""The engine that runs ZeRO."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from eagle_train import dist
from eagle_train.train.engine import spare_activations
from eagle_train.train.optim import fused_adamw, parameter_groups, set_learning_rates
from eagle_train.train.pieces import Piece
from eagle_train.train.placement import Placement, WholeWeights
from eagle_train.train.schedule import Stage
from eagle_train.train.sequence.spread import Spread
from eagle_train.train.zero.checkpoints import load_shards, save_shards, zero_pieces
from eagle_train.train.zero.config import zero_bytes, zero_config
from eagle_train.train.zero.host_adam import can_build_cpu_adam, cpu_adamw
from eagle_train.train.zero.join import join_deepspeed
from eagle_train.train.zero.masters import give_masters, keep_masters
from eagle_train.train.zero.sharding import ShardedWeights, gather_mixtures_at_once, whole_shape
from eagle_train.types import PackedBatch

log = logging.getLogger(__name__)


class ZeroEngine:
    """ZeRO: optimizer states (stage 1), gradients (2) and weights (3) sharded over ranks.

    Sizes of buckets are in elements; those of gradients are float32, those of weights bfloat16 under bf16.

    Args:
        model, stage: what is trained and how.
        micro_batches: per step and rank, before one update.
        placement: where the model's weights lie, and between stages their masters; null: made for it.
        zero_stage: 1, 2 or 3.
        bf16: bfloat16 weights with float32 master weights; null: where there is a GPU.
        activation_checkpointing, activation_offload, mlp_tile, sequence_parallel: see `PlainEngine`.
        overlap_comm: reduce gradients while the backward pass still runs; on GPUs it takes a second bucket.
        reduce_bucket_size: gradients reduced at once.
        allgather_bucket_size: weights that stages 1 and 2 send at once after an update.
        persistence_threshold: stage 3 leaves weights of at most so many elements whole on every rank.
        prefetch_bucket_size: weights that stage 3 gathers ahead of their use.
        max_live_parameters: weights that stage 3 holds whole at most, before it lets go of some.
        max_reuse_distance: stage 3 keeps weights that are used again within so many.
        sub_group_size: masters that stage 3 updates at once; a bound on what an update takes beside them.
        offload_optimizer: masters, gradients and optimizer states lie in host memory, where they are updated too.
        offload_param: weights of stage 3 lie in host memory, a layer's are on the device while it runs.
        pin_memory: that memory is page-locked, so that copies run beside the computation.
        cpu_adam: with `offload_optimizer`, DeepSpeedCPUAdam updates, which compiles an operator when it is first
            used; false: torch's fused AdamW; null: the former where there is a GPU and the operator can be built.

    Raises:
        ValueError: for settings that do not go together.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        micro_batches: int,
        *,
        placement: Placement | None = None,
        zero_stage: int = 2,
        bf16: bool | None = None,
        activation_checkpointing: bool = False,
        activation_offload: bool = False,
        mlp_tile: int | None = None,
        sequence_parallel: int = 1,
        overlap_comm: bool = False,
        reduce_bucket_size: int = 200_000_000,
        allgather_bucket_size: int = 200_000_000,
        persistence_threshold: int = 100_000,
        prefetch_bucket_size: int = 50_000_000,
        max_live_parameters: int = 1_000_000_000,
        max_reuse_distance: int = 1_000_000_000,
        sub_group_size: int = 1_000_000_000,
        offload_optimizer: bool = False,
        offload_param: bool = False,
        pin_memory: bool = True,
        cpu_adam: bool | None = None,
    ) -> None:
        if cpu_adam and not offload_optimizer:
            raise ValueError("engine.cpu_adam needs engine.offload_optimizer=true: it updates masters in host memory")
        bf16 = computes_in_bf16(bf16)
        config = zero_config(
            zero_stage=zero_stage,
            bf16=bf16,
            micro_batches=micro_batches,
            max_grad_norm=stage.max_grad_norm,
            overlap_comm=overlap_comm,
            reduce_bucket_size=reduce_bucket_size,
            allgather_bucket_size=allgather_bucket_size,
            persistence_threshold=persistence_threshold,
            prefetch_bucket_size=prefetch_bucket_size,
            max_live_parameters=max_live_parameters,
            max_reuse_distance=max_reuse_distance,
            sub_group_size=sub_group_size,
            offload_optimizer=offload_optimizer,
            offload_param=offload_param,
            pin_memory=pin_memory,
        )
        self.device = dist.device()
        self.model = model
        self.bf16 = bf16
        self.sharded = zero_stage == 3
        self.placement = placement or zero_placement(zero_stage, bf16, offload_param, pin_memory)
        spare_activations(model, activation_checkpointing, activation_offload, mlp_tile)
        self.spread = Spread(model, sequence_parallel)
        self.begin(stage, config, on_host=offload_optimizer, cpu_adam=cpu_adam)

    def begin(self, stage: Stage, config: dict, *, on_host: bool, cpu_adam: bool | None) -> None:
        """Puts weights in their place and makes DeepSpeed's engine of them."""
        deepspeed = join_deepspeed()
        self.own_attributes = {module: set(vars(module)) for module in self.model.modules()}
        self.placement.put_rest(self.model)
        self.own_attributes |= {parameter: set(vars(parameter)) for parameter in self.model.parameters()}
        self.hooks = gather_mixtures_at_once(self.model) if self.sharded else []
        shapes = {name: whole_shape(parameter) for name, parameter in self.model.named_parameters()}
        optimizer = make_optimizer(parameter_groups(self.model, stage, shapes), stage, on_host, cpu_adam)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.discarding = False
        self.left_out: list[tuple[torch.nn.Parameter, torch.Tensor | None]] = []
        optimizer.register_step_pre_hook(self.leave_out)
        optimizer.register_step_post_hook(self.give_back)
        if self.bf16:
            give_masters(self.model, self.placement.masters)

    @staticmethod
    def weights(
        *,
        zero_stage: int,
        bf16: bool | None = None,
        offload_param: bool = False,
        pin_memory: bool = True,
        **fields: object,
    ) -> Placement:
        """Returns where the weights of a run lie, from its start on; the fields are the constructor's."""
        del fields
        return zero_placement(zero_stage, computes_in_bf16(bf16), offload_param, pin_memory)

    @staticmethod
    def state_bytes(
        total: int,
        trainable: int,
        ranks: int,
        *,
        zero_stage: int,
        bf16: bool | None,
        offload_optimizer: bool = False,
        offload_param: bool = False,
        **fields: object,
    ) -> dict[str, int]:
        """Returns bytes per rank of weights, gradients and optimizer state, and, under `host`, what is offloaded.

        bfloat16 weights have a float32 master copy, which counts as optimizer state; `bf16` null is
        taken for a GPU's choice, true.

        Args:
            total, trainable: numbers of parameters.
            ranks: over which optimizer state, gradients (from stage 2) and weights (stage 3) are sharded.
        """
        del fields
        return zero_bytes(
            total,
            trainable,
            ranks,
            zero_stage=zero_stage,
            bf16=bf16,
            offload_optimizer=offload_optimizer,
            offload_param=offload_param,
        )

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32."""
        return self.engine(batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of `loss`. DeepSpeed averages over ranks: undone, since ours is a sum."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * dist.world_size(), scale_wrt_gas=False)

    def step(self, lr_scale: float, *, discard: bool = False) -> tuple[Mapping[str, float], float]:
        """Clips, updates and clears; returns learning rates and the gradient norm before clipping."""
        rates = set_learning_rates(self.optimizer, lr_scale)
        self.discarding = discard
        self.engine.step()
        norm = true_norm(self.engine.get_global_grad_norm())
        if not math.isfinite(norm) and not self.sharded and self.optimizer.cpu_offload:
            # DeepSpeed forgets gradients that are not finite unless it offloads; the next would be added to them.
            self.optimizer.averaged_gradients = dict.fromkeys(self.optimizer.averaged_gradients)
        return rates, norm

    def leave_out(self, optimizer: torch.optim.Optimizer, *arguments: object) -> None:
        """Takes the gradients from an update that is not to be: an optimizer passes over what has none.

        Called by DeepSpeed's update of masters, when it has worked out the norm: under bfloat16 it would go on with one
        that is not finite, and with weights that are not from then on.
        """
        del arguments
        if self.discarding or not math.isfinite(true_norm(self.optimizer._global_grad_norm)):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self.left_out.append((parameter, parameter.grad))
                    parameter.grad = None

    def give_back(self, optimizer: torch.optim.Optimizer, *arguments: object) -> None:
        """Gives masters the gradients again that they were left without: offloaded ones are made once and filled."""
        del optimizer, arguments
        for parameter, gradient in self.left_out:
            parameter.grad = gradient
        self.left_out.clear()

    def pieces(self) -> Iterator[Piece]:
        """Yields what this rank holds of masters, moments and frozen weights."""
        return zero_pieces(self.engine)

    def save(self, folder: Path) -> None:
        """Every rank writes what it holds."""
        save_shards(self.engine, folder)

    def load(self, folder: Path) -> None:
        """Restores this rank's part, whichever engine wrote it, on whatever number of ranks."""
        load_shards(self.engine, folder)

    def close(self) -> None:
        """Leaves the weights where they are, sharded under stage 3, without DeepSpeed's hooks and attributes.

        The float32 masters of bfloat16 weights wait in `placement` for the next stage.
        """
        for hook in (self.engine.module_forward_pre_hook, self.engine.module_forward_post_hook, *self.hooks):
            hook.remove()
        if self.sharded:
            self.engine.empty_partition_cache()
        if self.bf16:
            keep_masters(self.model, self.placement.masters)
        self.engine.destroy()
        self.engine.optimizer = None  # when it is collected, at any time, it would destroy what the next engine has
        self.spread.leave()
        del self.engine, self.optimizer
        for owner, own in self.own_attributes.items():  # the next engine would take them for its own
            for name in set(vars(owner)) - own:
                delattr(owner, name)
        for module in self.model.modules():
            module._parameters = dict(module._parameters)  # DeepSpeed's own kind of dict holds on to its engine
        gc.collect()  # masters and moments hang in cycles: the next engine's would be made beside them
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def true_norm(norm: torch.Tensor | float) -> float:
    """Returns a gradient norm as DeepSpeed reports it: -1 stands for one that is not finite."""
    return float(norm) if norm >= 0 else math.nan


def computes_in_bf16(bf16: bool | None) -> bool:
    """Returns an engine's choice of bfloat16; null: where there is a GPU."""
    return dist.device().type == "cuda" if bf16 is None else bf16


def zero_placement(zero_stage: int, bf16: bool, offload_param: bool, pin_memory: bool) -> Placement:
    """Returns where an engine's weights lie: on every rank, or in stage 3 each rank's part."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    if zero_stage == 3:
        return ShardedWeights(dist.device(), dtype, on_host=offload_param, pin_memory=pin_memory)
    return WholeWeights(dist.device(), dtype)


def make_optimizer(groups: list[dict], stage: Stage, on_host: bool, cpu_adam: bool | None) -> torch.optim.Optimizer:
    """Returns AdamW over groups of parameters, for masters in host memory DeepSpeed's where it is wanted."""
    if cpu_adam is None:
        cpu_adam = on_host and dist.device().type == "cuda" and can_build_cpu_adam()
    if on_host and dist.rank() == 0:
        log.warning("masters in host memory are updated by %s", "DeepSpeedCPUAdam" if cpu_adam else "torch's AdamW")
    return cpu_adamw(groups, stage) if cpu_adam else fused_adamw(groups, stage)
