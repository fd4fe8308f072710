"""The pieces of a checkpoint that a rank of ZeRO holds, and how they come back into another sharding.

DeepSpeed's own checkpoints are for the number of ranks and the stage that wrote them; its conversion to universal
ones mixes up the settings of parameter groups and shares one step count between them in stage 3 (as of 0.19.8). So
the pieces of masters and moments are read from its optimizer and written back to it, as its own loading does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed

from eagle_train.train.pieces import (
    WEIGHT,
    Piece,
    PieceReader,
    Whole,
    replicated_pieces,
    saved_tensors,
    whole_of,
    write_pieces,
)
from eagle_train.train.zero.sharding import is_sharded


@dataclass(frozen=True, slots=True)
class Fragment:
    """Where this rank keeps a part of a trained parameter.

    Args:
        parameter: the model's; under stage 3 its own values may not be there.
        start, count: elements of the flattened parameter.
        flat: the optimizer's float32 tensor that holds them, with others.
        offset: where in `flat` they begin.
    """

    parameter: torch.nn.Parameter
    start: int
    count: int
    flat: torch.Tensor
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Returns the part in `flat`, or in a moment of it, as a view (count,)."""
        return flat.detach().narrow(0, self.offset, self.count)


def save_shards(engine, folder: Path) -> None:
    """Writes what this rank holds of the state of a DeepSpeed engine into `folder`."""
    write_pieces(folder, list(zero_pieces(engine)))


def zero_pieces(engine) -> Iterator[Piece]:
    """Yields what this rank holds of a DeepSpeed engine's state, of stage 1, 2 or 3."""
    tensors = saved_tensors(engine.module)
    names = {tensor: name for name, tensor in tensors.items()}
    state = engine.optimizer.optimizer.state
    for fragment in fragments_of(engine, tensors):
        whole = whole_of_zero(fragment.parameter)
        of = state.get(fragment.flat, {})
        moments = {kind: values for kind, values in of.items() if kind != "step"}
        for kind, flat in {WEIGHT: fragment.flat, **moments}.items():
            name, step = names[fragment.parameter], float(of.get("step", 0))
            yield Piece(name, kind, fragment.start, fragment.of(flat), whole, step)
    frozen = {name: tensor for name, tensor in tensors.items() if not tensor.requires_grad}
    yield from replicated_pieces({name: t for name, t in frozen.items() if not is_sharded(t)}, {})
    for name, tensor in frozen.items():
        if is_sharded(tensor):
            start, count = own_part(tensor)
            yield Piece(name, WEIGHT, start, tensor.ds_tensor.detach()[:count], whole_of_zero(tensor))


@torch.no_grad()
def load_shards(engine, folder: Path) -> None:
    """Restores this rank's part of a checkpoint of any engine and number of ranks; groups' settings stay as they are.

    Raises:
        ValueError: if the checkpoint does not fit the engine's model.
    """
    reader = PieceReader(folder)
    optimizer, sharded = engine.optimizer, engine.zero_optimization_stage() == 3
    tensors = saved_tensors(engine.module)
    names = {tensor: name for name, tensor in tensors.items()}
    reader.check({name: whole_of_zero(tensor) for name, tensor in tensors.items()})
    if sharded:
        optimizer.checkpoint_event_prologue()  # takes apart weights that stay whole between steps
    fragments = fragments_of(engine, tensors)
    state = optimizer.optimizer.state
    for fragment in fragments:  # what an engine has done before does not matter
        if reader.moments():
            state[fragment.flat].pop("step", None)  # its moments stay: DeepSpeed holds views of them
        else:
            state.pop(fragment.flat, None)
    for fragment in fragments:
        restore(reader, names[fragment.parameter], fragment, optimizer.optimizer)
        if sharded:
            fragment.parameter.ds_tensor[: fragment.count].copy_(fragment.of(fragment.flat))
    for name, tensor in tensors.items():
        if is_sharded(tensor) and not tensor.requires_grad:
            start, count = own_part(tensor)
            tensor.ds_tensor[:count].copy_(reader.read(name, WEIGHT, start, count))
        elif not tensor.requires_grad:
            tensor.copy_(reader.read(name, WEIGHT).view(tensor.shape))
    if sharded:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()  # the model's weights, from the masters of all ranks


def restore(reader: PieceReader, name: str, fragment: Fragment, optimizer: torch.optim.Optimizer) -> None:
    """Copies a master and its moments into the optimizer, each flat tensor with a step count of its own."""
    fragment.of(fragment.flat).copy_(reader.read(name, WEIGHT, fragment.start, fragment.count))
    if not reader.moments():
        return
    of = optimizer.state[fragment.flat]
    # All of a flat tensor's parameters were updated together; one without a count was never updated.
    of["step"] = step_count(max(reader.steps.get(name, 0.0), float(of.get("step", 0))), fragment.flat, optimizer)
    for kind in reader.moments():
        if kind not in of:
            of[kind] = torch.zeros_like(fragment.flat.detach())
        fragment.of(of[kind]).copy_(reader.read(name, kind, fragment.start, fragment.count))


def step_count(step: float, flat: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor | int:
    """Returns a count of steps as an optimizer keeps it: torch's fused ones beside the values, DeepSpeed's as int."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return torch.tensor(step, dtype=torch.float32, device=flat.device)
    return int(step)


def fragments_of(engine, tensors: dict[str, torch.Tensor]) -> list[Fragment]:
    """Returns this rank's fragments of trained parameters, of stage 1, 2 or 3.

    Args:
        tensors: parameters and buffers of the model by name.
    """
    if engine.zero_optimization_stage() == 3:
        return list(sharded_fragments(engine.optimizer))
    return list(replicated_fragments(tensors, engine.optimizer))


def replicated_fragments(tensors: dict[str, torch.Tensor], optimizer) -> Iterator[Fragment]:
    """Yields this rank's fragments of trained parameters under stages 1 and 2, where weights are whole."""
    for tensor in tensors.values():
        mapping = tensor._hp_mapping if tensor.requires_grad else None
        if mapping is not None:  # None: all of it is another rank's
            (flat,) = optimizer.optimizer.param_groups[mapping.param_group_index]["params"]
            where = mapping.lp_fragment_address
            yield Fragment(tensor, where.start, where.numel, flat, mapping.get_hp_fragment_address().start)


def sharded_fragments(optimizer) -> Iterator[Fragment]:
    """Yields this rank's fragments of trained parameters under stage 3, where weights are sharded."""
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            start, count = own_part(parameter)
            if count:
                yield Fragment(parameter, start, count, flat, offset)
            offset += parameter.ds_tensor.numel()


def own_part(parameter) -> tuple[int, int]:
    """Returns start and number of the elements of a sharded parameter that are this rank's; the last have fewer."""
    size = parameter.ds_tensor.numel()
    start = size * torch.distributed.get_rank(parameter.ds_process_group)
    return start, max(0, min(size, parameter.ds_numel - start))


def whole_of_zero(tensor: torch.Tensor) -> Whole:
    """Returns what a checkpoint notes about a parameter or buffer, which may be sharded."""
    if is_sharded(tensor):
        return Whole(tuple(tensor.ds_shape), tensor.ds_tensor.dtype, tensor.requires_grad)
    return whole_of(tensor)
