"""The optimizer for masters in host memory."""

from __future__ import annotations

import torch

from eagle_train.train.schedule import Stage
from eagle_train.train.zero.join import import_deepspeed


def can_build_cpu_adam() -> bool:
    """Returns whether DeepSpeed's AdamW for the CPU is installed, or can be compiled here."""
    import_deepspeed()
    from deepspeed.ops.op_builder import CPUAdamBuilder

    return CPUAdamBuilder().is_compatible(verbose=False)


def cpu_adamw(groups: list[dict], stage: Stage) -> torch.optim.Optimizer:
    """Returns DeepSpeed's AdamW for the CPU, with float32 states; it compiles its operator on first use (a minute)."""
    import_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(
        groups, betas=tuple(stage.betas), eps=stage.eps, adamw_mode=True, fp32_optimizer_states=True
    )
