"""Typed fields, turned into DeepSpeed's configuration."""

from __future__ import annotations


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
