"""Which parameters are trained, at which learning rate: freezing, optimizer groups and the freeze table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import nn

from eagle_train.model.lora import is_adapter
from eagle_train.train.schedule import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class FreezeRow:
    """One line of the freeze table."""

    module: str
    total: int
    trainable: int
    learning_rate: float | None
    dtype: str


def rate_name(parameter: str, rates: Mapping[str, float | None]) -> str:
    """Returns the key of `rates` that is the longest prefix of a parameter's name.

    Raises:
        ValueError: if none is.
    """
    matches = [name for name in rates if parameter == name or parameter.startswith(f"{name}.")]
    if not matches:
        raise ValueError(f"no learning rate for {parameter}; learning_rates has {sorted(rates)} (null freezes)")
    return max(matches, key=len)


def freeze(model: nn.Module, rates: Mapping[str, float | None], adapted: Iterable[str] = ()) -> None:
    """Sets `requires_grad` of every parameter: trained where its learning rate is not null.

    Args:
        adapted: names of modules with adapters, of which these alone are trained.

    Raises:
        ValueError: for a parameter without a rate, or a rate that matches no parameter.
    """
    used = set()
    for name, parameter in model.named_parameters():
        key = rate_name(name, rates)
        used.add(key)
        parameter.requires_grad_(is_trained(name, rates, adapted))
    if unused := set(rates) - used:
        modules = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
        raise ValueError(f"learning_rates names {sorted(unused)}, which match nothing; modules are {modules}")


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict]:
    """Returns AdamW groups of the trained parameters, one per learning-rate name and weight decay.

    Each group has `name`, `peak_lr` and torch's own keys. Weight decay is for tensors of two or more
    dimensions, so norms and biases have none.
    """
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = rate_name(name, stage.learning_rates)
        decays = parameter.ndim >= 2
        group = groups.setdefault(
            (key, decays),
            {
                "params": [],
                "name": key,
                "peak_lr": stage.learning_rates[key],
                "lr": 0.0,
                "weight_decay": stage.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def adamw(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """Returns a fused AdamW over the trained parameters.

    Raises:
        ValueError: if everything is frozen.
    """
    groups = parameter_groups(model, stage)
    if not groups:
        raise ValueError("every learning rate is null: nothing would be trained")
    return torch.optim.AdamW(groups, betas=tuple(stage.betas), eps=stage.eps, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, scale: float) -> dict[str, float]:
    """Sets every group to `scale` times its peak and returns the rates by name."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


@contextmanager
def keeping_hyperparameters(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keeps the groups' settings (peak rates, decay, betas) while a state with older ones is loaded."""
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)


def is_trained(parameter: str, rates: Mapping[str, float | None], adapted: Iterable[str] = ()) -> bool:
    """Returns whether a parameter of this name has a learning rate, and is no weight that adapters take the place of.

    Args:
        adapted: names of modules with adapters.
    """
    base = not is_adapter(parameter) and any(parameter.startswith(f"{module}.") for module in adapted)
    return rates[rate_name(parameter, rates)] is not None and not base


def freeze_table(model: nn.Module, rates: Mapping[str, float | None], adapted: Iterable[str] = ()) -> list[FreezeRow]:
    """Returns parameters, trainable parameters, learning rate and dtype per module of `model`.

    The modules are the encoders by name, the mixture's own norms, the projector, the LLM and any aligner. A module's
    adapters have a line of their own.

    Args:
        adapted: names of modules with adapters.
    """
    rows: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        rows.setdefault(module_of(name), []).append((name, parameter))
    table = []
    for module, members in rows.items():
        trained = [(name, p) for name, p in members if is_trained(name, rates, adapted)]
        learning_rates = {rates[rate_name(name, rates)] for name, _ in trained}
        table.append(
            FreezeRow(
                module=module,
                total=sum(p.numel() for _, p in members),
                trainable=sum(p.numel() for _, p in trained),
                learning_rate=max(learning_rates, default=None),
                dtype=dtypes(p for _, p in members),
            )
        )
    return table


def with_dtypes(table: list[FreezeRow], model: nn.Module) -> list[FreezeRow]:
    """Returns a freeze table with the present dtypes: an engine may have changed them, and sharded the weights."""
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(module_of(name), []).append(parameter)
    return [replace(row, dtype=dtypes(members[row.module])) for row in table]


def dtypes(parameters: Iterable[nn.Parameter]) -> str:
    """Returns the dtypes of parameters, for example `bfloat16/float32`."""
    return "/".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}))


def module_of(parameter: str) -> str:
    """Returns the module a parameter counts under: `mixture.encoders.<name>`, or its first name, and its adapters."""
    parts = parameter.split(".")
    module = ".".join(parts[:3]) if parts[:2] == ["mixture", "encoders"] else parts[0]
    return f"{module} (lora)" if is_adapter(parameter) else module


def freeze_table_view(stage: str, rows: Sequence[FreezeRow]) -> Table:
    """Returns the freeze table of a stage for the terminal."""
    table = Table(title=f"stage {stage}: what is trained")
    for column in ("module", "parameters", "trainable", "lr", "dtype"):
        table.add_column(column, justify="left" if column in ("module", "dtype") else "right")
    for row in rows:
        rate = "frozen" if row.learning_rate is None else f"{row.learning_rate:g}"
        table.add_row(row.module, f"{row.total:,}", f"{row.trainable:,}", rate, row.dtype)
    total, trainable = sum(r.total for r in rows), sum(r.trainable for r in rows)
    table.add_row("total", f"{total:,}", f"{trainable:,}", "", "", style="bold")
    return table
