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
    allgather_bucket_size: int,
    persistence_threshold: int,
    prefetch_bucket_size: int,
    max_live_parameters: int,
    max_reuse_distance: int,
    sub_group_size: int,
    offload_optimizer: bool,
    offload_param: bool,
    pin_memory: bool,
) -> dict:
    """Returns DeepSpeed's configuration; every field is set here, none is "auto". See `ZeroEngine` for the fields.

    Raises:
        ValueError: for a stage that there is not, or parameters offloaded that are not sharded.
    """
    if zero_stage not in (1, 2, 3):
        raise ValueError(f"there is no zero_stage {zero_stage}; use 1, 2 or 3")
    if offload_param and zero_stage != 3:
        raise ValueError(
            f"engine.offload_param needs engine.zero_stage=3, not {zero_stage}; stages 1 and 2 keep weights"
        )
    host = {"device": "cpu", "pin_memory": pin_memory}
    whole = {"allgather_partitions": True, "allgather_bucket_size": allgather_bucket_size}
    sharded = {
        "stage3_param_persistence_threshold": persistence_threshold,
        "stage3_prefetch_bucket_size": prefetch_bucket_size,
        "stage3_max_live_parameters": max_live_parameters,
        "stage3_max_reuse_distance": max_reuse_distance,
        "sub_group_size": sub_group_size,
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
            "reduce_scatter": True,
            "reduce_bucket_size": reduce_bucket_size,
        }
        | (sharded if zero_stage == 3 else whole)
        | ({"offload_optimizer": host} if offload_optimizer else {})
        | ({"offload_param": host} if offload_param else {}),
        "steps_per_print": 1 << 62,
    }


def init_config(*, on_host: bool, pin_memory: bool) -> dict:
    """Returns what DeepSpeed needs to shard weights before there is an engine.

    Args:
        on_host: parts lie in host memory.
        pin_memory: which is page-locked.
    """
    host = {"offload_param": {"device": "cpu", "pin_memory": pin_memory}} if on_host else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False} | host,
    }


def zero_bytes(
    total: int,
    trainable: int,
    ranks: int,
    *,
    zero_stage: int,
    bf16: bool | None,
    offload_optimizer: bool,
    offload_param: bool,
) -> dict[str, int]:
    """Returns bytes per rank of weights, gradients and optimizer state, see `ZeroEngine.state_bytes`."""
    width = 4 if bf16 is False else 2
    shared = -(-trainable // ranks)
    parameters = width * (-(-total // ranks) if zero_stage == 3 else total)
    gradients = 4 * (trainable if zero_stage == 1 and not offload_optimizer else shared)
    optimizer = (8 if bf16 is False else 12) * shared
    on_host = {"parameters": offload_param, "gradients": offload_optimizer, "optimizer": offload_optimizer}
    sizes = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}
    host = sum(size for name, size in sizes.items() if on_host[name])
    device = {name: 0 if on_host[name] else size for name, size in sizes.items()}
    return device | ({"host": host} if host else {})
