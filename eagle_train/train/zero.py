"""DeepSpeed ZeRO behind the engine protocol: the only file that knows DeepSpeed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from eagle_train import dist
from eagle_train.model.mixtures.base import Mixture
from eagle_train.train.engine import spare_activations
from eagle_train.train.optim import adamw, keeping_hyperparameters, set_learning_rates
from eagle_train.train.pickles import check_pickles
from eagle_train.train.schedule import Stage
from eagle_train.types import PackedBatch

TAG = "zero"
WHOLE = "mp_rank_00_model_states.pt"
"""Weights in a checkpoint of stages 1 and 2; stage 3 has one file of this kind per rank, of shards."""


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
        bf16 = self.device.type == "cuda" if bf16 is None else bf16
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
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restores this rank's shards.

        Raises:
            ValueError: if the checkpoint was written by another number of ranks or another engine.
        """
        shards = len(list((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt")))
        if shards != dist.world_size():
            raise ValueError(
                f"{folder} holds ZeRO shards of {shards} ranks, this run has {dist.world_size()}; "
                f"go on with {shards} ranks and the engine that wrote them"
            )
        if (folder / TAG / WHOLE).exists() == self.sharded:
            raise ValueError(
                f"{folder} holds {'whole' if self.sharded else 'sharded'} weights, which this engine cannot read; "
                f"go on with engine.zero_stage={'1 or 2' if self.sharded else '3'}"
            )
        check_pickles(folder / TAG)
        with keeping_hyperparameters(self.optimizer):
            path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise ValueError(f"DeepSpeed found nothing to load in {folder / TAG}")

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
    (pixels,) = inputs
    return (pixels.float().requires_grad_(),) if torch.is_grad_enabled() else inputs


def through_inputs(mixture: Mixture, inputs: tuple, features: torch.Tensor) -> torch.Tensor:
    """Returns features that depend on the pixels, also where frozen encoders do not hand gradients on."""
    del mixture
    (pixels,) = inputs
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


def zero_config(
    *,
    zero_stage: int,
    bf16: bool,
    micro_batches: int,
    max_grad_norm: float | None,
    overlap_comm: bool,
    reduce_bucket_size: int,
    persistence_threshold: int,
    prefetch_bucket_size: int,
) -> dict:
    """Returns DeepSpeed's configuration; every field is set here, none is "auto"."""
    sharded = {
        "stage3_param_persistence_threshold": persistence_threshold,
        "stage3_prefetch_bucket_size": prefetch_bucket_size,
        # DeepSpeed would replace torch's linear function for the whole process, with another rounding in bfloat16.
        "memory_efficient_linear": False,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": max_grad_norm or 0.0,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": overlap_comm,
            "contiguous_gradients": True,
            "reduce_bucket_size": reduce_bucket_size,
        }
        | (sharded if zero_stage == 3 else {}),
        "steps_per_print": 1 << 62,
    }


def import_deepspeed():
    """Returns DeepSpeed.

    On a CPU it would compile a shared-memory operator when it joins the ranks (30 s, needs ninja and a
    compiler), which gloo does not need: it is marked as not built.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.logger.setLevel("WARNING")
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join_deepspeed():
    """Returns DeepSpeed with its communication joined to ours."""
    deepspeed = import_deepspeed()
    dist.init_single()
    dist.export_env()
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
    return deepspeed


def read_zero_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a checkpoint that `ZeroEngine` wrote, by parameter name, as they were trained.

    Shards are merged from their float32 masters; under bf16 these are rounded to what the model computed with.
    """
    path = checkpoint / TAG / WHOLE
    if path.exists():
        return torch.load(path, map_location="cpu", weights_only=True)["module"]
    import_deepspeed()
    check_pickles(checkpoint / TAG)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(sys.stderr):  # it prints what it does
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    stored = torch.load(checkpoint / TAG / f"zero_pp_rank_0_{WHOLE}", map_location="cpu", weights_only=True)
    return {name: weights[name].to(tensor.dtype) for name, tensor in stored["module"].items()}
