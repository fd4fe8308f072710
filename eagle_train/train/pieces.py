"""The state of a training in pieces by parameter name: one format of checkpoint for every engine and number of ranks.

A piece is a run of elements of a flattened tensor: of a weight, or of one of the optimizer's moments of it. Ranks write
the pieces that they hold, whatever cut them; who reads asks for any run of elements of any tensor. So a checkpoint of
ZeRO-3 on 64 ranks is read by plain torch on one, without a conversion between them. Weights that are trained are
float32 masters. The files are safetensors: reading one cannot run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from eagle_train import dist
from eagle_train.model.checkpoints.files import LazyWeights, listed
from eagle_train.train.tensor_file import Entry, Written, write_tensors

FILES = "state-*-of-*.safetensors"
WEIGHT = "weight"
"""The kind of pieces that are not an optimizer's: weights, and buffers that are saved."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What a piece is a piece of.

    Args:
        shape: of the parameter or buffer.
        dtype: that the model computes with; pieces of it may be wider.
        trained: whether it has optimizer state.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `start + len(values)` of a flattened tensor.

    Args:
        name: of the parameter or buffer.
        kind: `weight`, or the optimizer's word (`exp_avg`).
        values: (n,), any dtype and device.
        whole: what it is a piece of.
        step: updates that the optimizer made, where the parameter is trained.
    """

    name: str
    kind: str
    start: int
    values: torch.Tensor
    whole: Whole
    step: float | None = None


def write_pieces(folder: Path, pieces: list[Piece]) -> dict[str, Written]:
    """Writes this rank's pieces into its file in `folder`; returns what was written by file name."""
    name = f"state-{dist.rank():05d}-of-{dist.world_size():05d}.safetensors"
    parameters = {
        piece.name: {
            "shape": list(piece.whole.shape),
            "dtype": str(piece.whole.dtype).removeprefix("torch."),
            "trained": piece.whole.trained,
            "step": piece.step,
        }
        for piece in pieces
    }
    entries = [
        Entry(f"{p.kind}/{p.start}/{p.name}", p.values.dtype, tuple(p.values.shape), lambda p=p: p.values)
        for p in pieces
    ]
    return {name: write_tensors(folder / name, entries, {"parameters": json.dumps(parameters)})}


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns what a checkpoint holds of a model, by name: its parameters, tied ones once, and its saved buffers."""
    saved = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def replicated_pieces(
    tensors: Mapping[str, torch.Tensor], state: Mapping[torch.Tensor, Mapping[str, torch.Tensor]]
) -> Iterator[Piece]:
    """Yields this rank's share of what is the same on every rank: the ranks together yield everything once.

    Args:
        tensors: parameters and buffers by name.
        state: the optimizer's, of those parameters that it has updated.
    """
    for name in shared_out({name: tensor.nbytes for name, tensor in tensors.items()}):
        tensor = tensors[name]
        of = state.get(tensor, {})
        step = float(of.get("step", 0)) if tensor.requires_grad else None
        moments = {kind: moment for kind, moment in of.items() if kind != "step"}
        for kind, values in {WEIGHT: tensor, **moments}.items():
            yield Piece(name, kind, 0, values.detach().reshape(-1), whole_of(tensor), step)


def check_complete(pieces: Iterable[Piece], model: nn.Module) -> None:
    """Checks that the ranks together hold every weight of the model exactly once; all ranks call it.

    Raises:
        RuntimeError: if they do not, on every rank: what would be written could not be resumed from.
    """
    sizes = {name: getattr(tensor, "ds_numel", tensor.numel()) for name, tensor in saved_tensors(model).items()}
    held = dict.fromkeys(sizes, 0)
    for piece in pieces:
        if piece.kind == WEIGHT:
            held[piece.name] += len(piece.values)
    found = dict(zip(held, dist.all_reduce_sum(list(held.values())), strict=True))
    wrong = [f"{name} {found[name]:.0f} of {size}" for name, size in sizes.items() if found[name] != size]
    if wrong:
        raise RuntimeError(f"the ranks do not hold each element of every weight once: {listed(wrong)}")


def whole_of(tensor: torch.Tensor) -> Whole:
    """Returns what a checkpoint notes about a parameter or buffer."""
    return Whole(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def shared_out(sizes: Mapping[str, int]) -> list[str]:
    """Returns the names that fall to this rank when the ranks share them out evenly by size."""
    loads = [0] * dist.world_size()
    mine = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = loads.index(min(loads))
        loads[rank] += sizes[name]
        if rank == dist.rank():
            mine.append(name)
    return mine


class PieceReader:
    """Reads the pieces in a folder, mapped into memory, as if they had never been cut.

    Args:
        folder: that all ranks wrote into.

    Raises:
        ValueError: if there are none, or a rank's are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wholes: dict[str, Whole] = {}
        self.steps: dict[str, float] = {}
        self.kinds: dict[str, set[str]] = {}
        self._places: dict[tuple[str, str], list[tuple[int, int, str]]] = {}  # start, file, key
        self._files = []
        paths = sorted(folder.glob(FILES))
        ranks = int(paths[0].stem.rpartition("-")[2]) if paths else 0
        if not paths or len(paths) != ranks:
            raise ValueError(
                f"{folder} has the state of {len(paths)} ranks instead of {ranks or 'at least 1'}; it is no whole "
                f"checkpoint of this version"
            )
        try:
            for path in paths:
                self._open(path)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def _open(self, path: Path) -> None:
        file = safe_open(path, framework="pt")
        for name, about in json.loads(file.metadata()["parameters"]).items():
            self.wholes[name] = Whole(tuple(about["shape"]), getattr(torch, about["dtype"]), about["trained"])
            if about["step"] is not None:
                self.steps[name] = max(about["step"], self.steps.get(name, 0.0))
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            kind, start, name = key.split("/", 2)
            self.kinds.setdefault(name, set()).add(kind)
            self._places.setdefault((name, kind), []).append((int(start), len(self._files), key))
        self._files.append(file)

    def moments(self) -> list[str]:
        """Returns the kinds of optimizer state that any parameter has."""
        return sorted(set().union(*self.kinds.values()) - {WEIGHT})

    def read(self, name: str, kind: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Returns elements of a flattened tensor.

        Args:
            start, count: which; all by default.

        Returns:
            (count,), as it was written. An optimizer's state that was not written yet is zero.

        Raises:
            ValueError: if not all of them are there.
        """
        count = torch.Size(self.wholes[name].shape).numel() - start if count is None else count
        if kind != WEIGHT and kind not in self.kinds[name]:
            return torch.zeros(count)
        parts, position = [], start
        for begin, file, key in sorted(self._places.get((name, kind), [])):
            piece = self._files[file].get_slice(key)
            end = begin + piece.get_shape()[0]
            if begin <= position < min(end, start + count):
                until = min(end, start + count)
                all_of_it = (position, until) == (begin, end)  # stays mapped: it costs memory only while it is used
                parts.append(
                    self._files[file].get_tensor(key) if all_of_it else piece[position - begin : until - begin]
                )
                position = until
        if position != start + count:
            raise ValueError(f"{self.folder} lacks elements {position} to {start + count} of {kind} of {name}")
        return parts[0] if len(parts) == 1 else torch.cat(parts or [torch.zeros(0)])

    def check(self, wholes: Mapping[str, Whole]) -> None:
        """Raises ValueError unless the checkpoint holds exactly these tensors, whatever their dtypes.

        Args:
            wholes: of the model that is to be restored.
        """
        common = wholes.keys() & self.wholes.keys()
        faults = {
            "missing in it": [name for name in wholes if name not in self.wholes],
            "unknown to the model": [name for name in self.wholes if name not in wholes],
            "of another shape": [
                f"{name} {self.wholes[name].shape} instead of {wholes[name].shape}"
                for name in sorted(common)
                if self.wholes[name].shape != wholes[name].shape
            ],
            "trained there and frozen here, or the reverse": [
                name for name in sorted(common) if self.wholes[name].trained != wholes[name].trained
            ],
        }
        if any(faults.values()):
            found = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in faults.items() if names)
            raise ValueError(f"{self.folder} does not fit this run's model and stage: {found}")


class CheckpointWeights(LazyWeights):
    """The weights in a folder of pieces by name, as the model computed with them; each is read when it is asked for.

    Args:
        reader: of the pieces.
        names: of the weights that count; None: all.
    """

    def __init__(self, reader: PieceReader, names: Iterable[str] | None = None) -> None:
        self.reader = reader
        self.names = list(reader.wholes if names is None else names)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns a weight whole; float32 masters are rounded to the dtype of the model."""
        if name not in self.reader.wholes:
            raise KeyError(name)
        whole = self.reader.wholes[name]
        return self.reader.read(name, WEIGHT).to(whole.dtype).view(whole.shape)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a weight."""
        return torch.Size(self.reader.wholes[name].shape)

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self.names)

    def __len__(self) -> int:
        """Returns the number of weights."""
        return len(self.names)

    def only(self, names: Iterable[str]) -> CheckpointWeights:
        """Returns those of the weights that have one of these names."""
        wanted = set(names)
        return CheckpointWeights(self.reader, [name for name in self.names if name in wanted])


@torch.no_grad()
def load_replicated(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores weights, buffers and optimizer state that are whole on this rank; groups' settings stay as they are.

    Raises:
        ValueError: if the checkpoint does not fit the model.
    """
    reader = PieceReader(folder)
    tensors = saved_tensors(model)
    reader.check({name: whole_of(tensor) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        tensor.copy_(reader.read(name, WEIGHT).view(tensor.shape))
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or not reader.kinds[name] > {WEIGHT}:
            continue
        # The fused AdamW wants its count of steps where the parameter is.
        state = {"step": torch.tensor(reader.steps[name], dtype=torch.float32, device=parameter.device)}
        for kind in sorted(reader.kinds[name] - {WEIGHT}):
            state[kind] = reader.read(name, kind).view(parameter.shape).to(parameter.device, copy=True)
        optimizer.state[parameter] = state
