"""DeepSpeed ZeRO behind the engine protocol: the only file that knows DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from eagle_train import dist
from eagle_train.train.optim import adamw, keeping_hyperparameters, set_learning_rates
from eagle_train.train.schedule import Stage
from eagle_train.types import PackedBatch

TAG = "zero"


class ZeroEngine:
    """ZeRO stage 1 or 2: optimizer states (and gradients) sharded over ranks, weights replicated.

    Args:
        model, stage: what is trained and how.
        micro_batches: per step and rank, before one update.
        zero_stage: 1 or 2.
        bf16: bfloat16 weights with float32 master weights; null: where there is a GPU.
        activation_checkpointing: recompute activations in the backward pass.
        overlap_comm: reduce gradients while the backward pass still runs.
        reduce_bucket_size: elements reduced at once.
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
        overlap_comm: bool = False,
        reduce_bucket_size: int = 500_000_000,
    ) -> None:
        if zero_stage not in (1, 2):
            raise ValueError(f"zero_stage {zero_stage} is not supported here; use 1 or 2")
        self.device = dist.device()
        bf16 = self.device.type == "cuda" if bf16 is None else bf16
        self.model = model.to(self.device)
        if activation_checkpointing:
            model.set_activation_checkpointing()
        config = zero_config(
            zero_stage=zero_stage,
            bf16=bf16,
            micro_batches=micro_batches,
            max_grad_norm=stage.max_grad_norm,
            overlap_comm=overlap_comm,
            reduce_bucket_size=reduce_bucket_size,
        )
        deepspeed = import_deepspeed()
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=adamw(model, stage), config=config, dist_init_required=False
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
            ranks: over which gradients (stage 2) and optimizer state are sharded.
        """
        del fields
        width = 4 if bf16 is False else 2
        shared = -(-trainable // ranks)
        return {
            "parameters": width * total,
            "gradients": 4 * (shared if zero_stage == 2 else trainable),
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
        """Restores weights and this rank's shard of the optimizer state.

        Raises:
            ValueError: if the checkpoint was written by another number of ranks.
        """
        shards = len(list((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt")))
        if shards != dist.world_size():
            raise ValueError(
                f"{folder} holds ZeRO shards of {shards} ranks, this run has {dist.world_size()}; "
                f"go on with {shards} ranks and the engine that wrote them"
            )
        with keeping_hyperparameters(self.optimizer):
            path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise ValueError(f"DeepSpeed found nothing to load in {folder / TAG}")

    def close(self) -> None:
        """Removes DeepSpeed's hooks from the model, which would keep the engine's memory alive.

        Under bf16 the model keeps bfloat16 weights: the float32 masters of a finished stage are not carried
        over to the next.
        """
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        self.engine.destroy()
        del self.engine, self.optimizer


def zero_config(
    *,
    zero_stage: int,
    bf16: bool,
    micro_batches: int,
    max_grad_norm: float | None,
    overlap_comm: bool,
    reduce_bucket_size: int,
) -> dict:
    """Returns DeepSpeed's configuration; every field is set here, none is "auto"."""
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
        },
        "steps_per_print": 1 << 62,
    }


def import_deepspeed():
    """Returns DeepSpeed with its communication joined to ours.

    On a CPU it would compile a shared-memory operator at start (30 s, needs ninja and a compiler), which
    gloo does not need: it is marked as not built.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.logger.setLevel("WARNING")
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_single()
    dist.export_env()
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
    return deepspeed


def read_zero_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a checkpoint that `ZeroEngine` wrote, by parameter name."""
    path = checkpoint / TAG / "mp_rank_00_model_states.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["module"]
