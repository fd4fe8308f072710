"""Which parameters are trained, at which learning rate: freezing, optimizer groups and the freeze table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def longest_prefix(parameter: str, names: Iterable[str]) -> str | None:
    """Returns which of the names of modules or parameters is the longest that a parameter is under, if any."""
    matches = [name for name in names if parameter == name or parameter.startswith(f"{name}.")]
    return max(matches, key=len, default=None)


def rate_name(parameter: str, rates: Mapping[str, float | None]) -> str:
    """Returns the key of `rates` that is the longest prefix of a parameter's name.

    Raises:
        ValueError: if none is.
    """
    name = longest_prefix(parameter, rates)
    if name is None:
        raise ValueError(f"no learning rate for {parameter}; learning_rates has {sorted(rates)} (null freezes)")
    return name


def decay_of(parameter: str, weight_decay: float | Mapping[str, float]) -> float:
    """Returns the weight decay of a matrix.

    Args:
        weight_decay: of all, or by module, of which the longest prefix counts.

    Raises:
        ValueError: if no module's is.
    """
    if not isinstance(weight_decay, Mapping):
        return weight_decay
    name = longest_prefix(parameter, weight_decay)
    if name is None:
        raise ValueError(f"no weight decay for {parameter}; weight_decay has {sorted(weight_decay)}")
    return weight_decay[name]


def freeze(model: nn.Module, rates: Mapping[str, float | None], adapted: Iterable[str] = ()) -> None:
    """Sets `requires_grad` of every parameter: trained where its learning rate is not null.

    Args:
        adapted: names of modules with adapters, of which these alone are trained.

    Raises:
        ValueError: for a parameter without a rate, a rate that matches no parameter, or one that matches none but
            weights below adapters.
    """
    trains = {}
    for name, parameter in model.named_parameters():
        key = rate_name(name, rates)
        parameter.requires_grad_(is_trained(name, rates, adapted))
        trains[key] = trains.get(key, False) or parameter.requires_grad
    if unused := set(rates) - trains.keys():
        modules = module_names(name for name, _ in model.named_parameters())
        raise ValueError(f"learning_rates names {sorted(unused)}, which match nothing; modules are {modules}")
    if idle := [name for name, trained in trains.items() if rates[name] is not None and not trained]:
        raise ValueError(
            f"learning_rates gives {idle} a rate, and lora freezes what they match: of {', '.join(adapted)} the "
            f"adapters alone are trained; leave them out of learning_rates, or leave out their module's lora"
        )


def parameter_groups(model: nn.Module, stage: Stage, shapes: Mapping[str, torch.Size] | None = None) -> list[dict]:
    """Returns AdamW groups of the trained parameters, one per learning-rate name and weight decay.

    Each group has `name`, `peak_lr` and torch's own keys. Weight decay is for tensors of two or more
    dimensions, so norms and biases have none.

    Args:
        shapes: of the parameters by name, where those in `model` are sharded.

    Raises:
        ValueError: if everything is frozen, a matrix has no weight decay, or one is given to what is not there.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = rate_name(name, stage.learning_rates)
        decays = len(shapes[name] if shapes else parameter.shape) >= 2
        decay = decay_of(name, stage.weight_decay) if decays else 0.0
        group = groups.setdefault(
            (key, decays, decay),
            {"params": [], "name": key, "peak_lr": stage.learning_rates[key], "lr": 0.0, "weight_decay": decay},
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("every learning rate is null: nothing would be trained")
    names = [name for name, _ in model.named_parameters()]
    asked = stage.weight_decay if isinstance(stage.weight_decay, Mapping) else {}
    if idle := [name for name in asked if not any(longest_prefix(one, [name]) for one in names)]:
        raise ValueError(f"weight_decay names {idle}, which match nothing; modules are {module_names(names)}")
    return list(groups.values())


def module_names(parameters: Iterable[str]) -> list[str]:
    """Returns the first parts of names of parameters, sorted."""
    return sorted({name.split(".")[0] for name in parameters})


def adamw(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """Returns a fused AdamW over the trained parameters.

    Raises:
        ValueError: see `parameter_groups`.
    """
    return fused_adamw(parameter_groups(model, stage), stage)


def fused_adamw(groups: list[dict], stage: Stage) -> torch.optim.Optimizer:
    """Returns a fused AdamW over groups of parameters."""
    return torch.optim.AdamW(groups, betas=tuple(stage.betas), eps=stage.eps, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, scale: float) -> dict[str, float]:
    """Sets every group to `scale` times its peak and returns the rates by name."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


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
